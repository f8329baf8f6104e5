"""The experiments of the paper, the questions it left open, related papers: a module for each.

    from qkvnorm_lens import experiments
    outcome = experiments.run("collapse", ["addition-pre", "gpt2"], out="runs/collapse")
    outcome.table

On the command line: ``qkvnorm-lens experiment``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkvnorm_lens.arguments import check_name
from qkvnorm_lens.experiments.core import NAMES, get_experiment

if TYPE_CHECKING:
    from qkvnorm_lens.experiments.core import Outcome, Size

__all__ = ["NAMES", "get_experiment", "run"]


def run(
    name: str,
    models: Sequence[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    size: Size = "quick",
    progress: bool | None = None,
) -> Outcome:
    """Run an experiment, or what is missing of it, and write its table, figure and text.

    Args:
        name: one of `NAMES`.
        models: names of shipped models, directories or Hugging Face ids; default: the study models
            and the shipped ones (few of them where ``size`` is not ``"full"``).
        out: the directory; the results go into a folder of the experiment's name there [
            ``runs/experiments``].
        size: ``"quick"`` (minutes), ``"full"`` (what the report is made of) or ``"smoke"``.
        progress: show a progress bar; default: in a terminal or a notebook.

    Raises:
        ValueError: no such experiment or size, or no model that it can look at.
        LoadError: no such model.
    """
    from hooks.arguments import brief, check_optional, check_path, read_list
    from qkvnorm_lens.arguments import directory
    from qkvnorm_lens.experiments.core import SIZES, default_subjects, find_subjects, run_experiment

    check_name("size", size, SIZES)
    names = None if models is None else read_list("models", models, "a list of names")
    for each in names or ():
        if not isinstance(each, (str, os.PathLike)):
            raise TypeError(f"models: wanted a list of names; got {brief(each)} in it")
    (progress,) = check_optional(progress=progress)
    folder = Path("runs/experiments") if out is None else check_path("out", out)
    directory("out", folder)
    experiment = get_experiment(name)
    subjects = default_subjects(size) if names is None else find_subjects(names)
    return run_experiment(experiment, subjects, folder, size=size, progress=progress)
