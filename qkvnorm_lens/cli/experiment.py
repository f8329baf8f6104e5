"""``qkvnorm-lens experiment``: the paper's figures and tables, and what goes beyond it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qkvnorm_lens.arguments import directory, some_path
from qkvnorm_lens.cli.figures import formats
from qkvnorm_lens.experiments.core import NAMES, get_experiment

if TYPE_CHECKING:
    from qkvnorm_lens.experiments.core import Experiment, Size, Subject

HELP = "make a figure or table of the paper, on any model"
DESCRIPTION = """\
Run one experiment, or all, and write DIR/NAME/table.csv, about.json, figure.png and text.md.
Finished parts are kept: a stopped run resumes where it was. NAME is one of

  {names}

`list` describes each; `report` compares all results under DIR with the published ones: a
summary, and a page for each experiment. Without --model: small models trained on addition, which
a clone has; a wheel has three of them."""
EPILOG = """\
examples:
  qkvnorm-lens experiment list
  qkvnorm-lens experiment collapse
  qkvnorm-lens experiment spread --model gpt2 --out runs/gpt2
  qkvnorm-lens experiment all --full --out results/addition
  qkvnorm-lens experiment report --out results
"""


def _wrapped(names: Sequence[str]) -> str:
    half = (len(names) + 1) // 2
    return ", ".join(names[:half]) + ",\n  " + ", ".join([*names[half:], "all"])


DESCRIPTION = DESCRIPTION.format(names=_wrapped(NAMES))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default="list",
        choices=[*NAMES, "all", "list", "report"],
        help="[list]",
    )
    said = (
        "a shipped model, a directory or a Hugging Face id; may be given several times; "
        "`study` and `language` stand for all trained models of that name [study models and "
        "shipped ones]"
    )
    parser.add_argument("--model", action="append", metavar="MODEL", help=said)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="as much as the report is made of")
    size.add_argument("--smoke", action="store_true", help="seconds, to see that it runs")
    said = "[%(default)s]"
    parser.add_argument(
        "--out", type=some_path, metavar="DIR", default=Path("runs/experiments"), help=said
    )
    said = "of the figure, beside PNG: pdf, svg; a finished experiment is only drawn again"
    parser.add_argument("--format", type=formats, metavar="LIST", default=(), help=said)
    parser.add_argument(
        "--to", type=some_path, metavar="PAGES", help="report: their directory [DIR/reproduction]"
    )


def run(args: argparse.Namespace) -> str:
    """Run the requested experiments; returns their texts."""
    if args.name == "list":
        return _listed()
    if args.name == "report":
        from qkvnorm_lens.experiments.core import write_report

        to = args.to or args.out / "reproduction"
        directory("--to" if args.to else "--out", to)
        return f"written: {write_report(args.out, to)}"
    if args.to is not None:
        raise ValueError(f"--to: wanted `experiment report`; got `experiment {args.name}`")
    directory("--out", args.out)
    size: Size = "full" if args.full else "smoke" if args.smoke else "quick"
    from qkvnorm_lens.experiments.core import default_subjects, find_subjects

    subjects = default_subjects(size) if args.model is None else find_subjects(args.model)
    names = NAMES if args.name == "all" else (args.name,)
    answers = []
    for name in names:
        answers.append(_one(get_experiment(name), subjects, size, args, given=args.name))
    return "\n\n".join(answers)


def _one(
    experiment: Experiment,
    subjects: tuple[Subject, ...],
    size: Size,
    args: argparse.Namespace,
    given: str,
) -> str:
    from qkvnorm_lens.experiments.core import fitting, run_experiment

    own = experiment.models == "none"
    if given == "all" and args.model is not None and (own or not fitting(experiment, subjects)):
        what = "makes its own models" if own else "wants models that add integers"
        return f"{experiment.name}: left out, it {what}"
    print(f"{experiment.name}: {experiment.title}", file=sys.stderr)  # noqa: T201
    command = _command(experiment.name, size, args)
    outcome = run_experiment(
        experiment, subjects, args.out, size=size, command=command, formats=args.format
    )
    return (
        f"{experiment.name}: {experiment.title} ({experiment.source})\n\n{outcome.text}\n\n"
        f"Written to {outcome.folder}"
    )


def _command(name: str, size: Size, args: argparse.Namespace) -> str:
    """The command that gives these results again; directories of models by their last part only."""
    models = [m if not os.path.isdir(m) else Path(m).name for m in args.model or ()]
    words = ["qkvnorm-lens", "experiment", name]
    words += [] if size == "quick" else [f"--{size}"]
    for model in models:
        words += ["--model", model]
    return " ".join([*words, "--out", args.out.name if args.out.is_absolute() else str(args.out)])


def _listed() -> str:
    from qkvnorm_lens.tables import table

    rows = []
    for name in NAMES:
        e = get_experiment(name)
        budget = [f"{e.minutes[size]:g}" for size in ("smoke", "quick", "full")]
        rows.append([name, e.title, *budget])
    head = ["name", "what", "smoke", "quick", "full: core-minutes"]
    return table(head, rows, left=(0, 1))
