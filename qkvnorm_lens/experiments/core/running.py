"""Running an experiment: part by part, each written as it ends; then table, figure and text.

DIR/NAME/parts/SIZE/KEY.json   rows of one part, with what they depend on
DIR/NAME/table.csv        all rows
DIR/NAME/about.json       configuration, models, seeds, versions, cost
DIR/NAME/figure.png, text.md
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pandas as pd
from tqdm.auto import tqdm

from hooks.reports import write_whole
from qkvnorm_lens.experiments.core.base import SIZES, Experiment, Part, Size, Subject
from qkvnorm_lens.experiments.core.registry import check_installed

VERSIONS: Final = ("qkvnorm-lens", "torch", "transformer-lens", "transformers", "numpy")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an experiment gave.

    Attributes:
        table: all rows.
        about: configuration, models, seeds, versions and cost.
        text: what was found.
        folder: where it was written.
    """

    table: pd.DataFrame
    about: dict[str, Any]
    text: str
    folder: Path


def fitting(experiment: Experiment, subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """Those of the models that the experiment can look at."""
    if experiment.models == "addition":
        return tuple(s for s in subjects if s.kind == "addition")
    return tuple(subjects) if experiment.models == "any" else ()


def run_experiment(
    experiment: Experiment,
    subjects: Sequence[Subject],
    out: str | os.PathLike[str],
    *,
    size: Size = "quick",
    command: str = "",
    progress: bool | None = None,
) -> Outcome:
    """Run what is missing of an experiment, and write its table, figure and text.

    Args:
        experiment: which.
        subjects: the models; those it can't look at are left out.
        out: the directory; parts that lie there and depend on the same are not run again.
        size: how much.
        command: what to write down as the way to get these results.
        progress: show a progress bar; default: in a terminal or a notebook.

    Raises:
        ValueError: no model that the experiment can look at, or a directory that holds the results
            of a larger size.
        ImportError: scipy or matplotlib is not installed.
    """
    check_installed()
    chosen = fitting(experiment, subjects)
    if experiment.models != "none" and not chosen:
        what = "a model that adds integers" if experiment.models == "addition" else "a model"
        got = [s.name for s in subjects] or "none"
        raise ValueError(f"{experiment.name}: wanted {what}; got {got}")
    folder = Path(out) / experiment.name
    _check_smaller(folder, size)
    parts = list(experiment.parts(chosen, size))
    keys = [part.key for part in parts]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{experiment.name}: wanted parts of different keys; got {keys}")
    done: list[dict[str, Any]] = []
    hidden = None if progress is None else not progress
    with tqdm(parts, desc=experiment.name, unit="part", disable=hidden) as bar:
        for part in bar:
            bar.set_postfix_str(part.key)
            done.append(_one(experiment, part, size, folder / "parts" / size / f"{part.key}.json"))
    table = pd.concat([_frame(d) for d in done], ignore_index=True)
    about = _about(experiment, chosen, size, parts, done, command)
    text = experiment.text(table)
    _write(folder / "about.json", json.dumps(about, indent=2) + "\n")
    _write(folder / "table.csv", table.to_csv(index=False, lineterminator="\n"))
    _write(folder / "text.md", text.rstrip() + "\n")
    picture = io.BytesIO()
    experiment.figure(table).savefig(picture, format="png")
    write_whole(folder / "figure.png", picture.getvalue())
    return Outcome(table, about, text, folder)


def read_table(folder: Path) -> pd.DataFrame:
    """The table that an experiment wrote, number for number."""
    with warnings.catch_warnings():  # pandas 3.1 always reads so, and earlier ones have to be told
        warnings.filterwarnings("ignore", message=".*float_precision.*")
        none: dict[str, Any] = {"keep_default_na": False, "na_values": ["", "nan"]}
        table: pd.DataFrame = pd.read_csv(
            folder / "table.csv", float_precision="round_trip", **none
        )
    if "placement" in table:  # empty for other people's models, and no number
        table["placement"] = table["placement"].astype(object).fillna("")
    return table


def depends_on(experiment: Experiment, part: Part, size: Size) -> dict[str, Any]:
    """What the rows of a part depend on; a part of other settings is run again."""
    subject = part.subject
    return {
        "experiment": experiment.name,
        "version": experiment.version,
        "part": part.key,
        "size": size,
        "settings": json.loads(json.dumps(dict(part.settings))),
        "model": None if subject is None else [subject.name, subject.digest],
        "card": None if subject is None else [subject.group, subject.seed, subject.sums],
        "versions": {name: version(name) for name in VERSIONS},
    }


def _one(experiment: Experiment, part: Part, size: Size, path: Path) -> dict[str, Any]:
    wanted = depends_on(experiment, part, size)
    held = _held(path)
    known = part.subject is None or part.subject.digest  # else: nobody can say of which weights
    if known and held.get("depends_on") == wanted and held.get("digest") == _digest(held):
        return held
    cpu, clock = time.process_time(), time.perf_counter()
    rows = part.work()
    made = {
        "depends_on": wanted,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - clock, 1),
        "columns": list(rows.columns),
        "rows": [[_plain(x) for x in row] for row in rows.itertuples(index=False)],
    }
    made["digest"] = _digest(made)
    _write(path, json.dumps(made) + "\n")
    return made


def _digest(part: dict[str, Any]) -> str:
    """Of all that a part's file says, but for this."""
    said = {name: value for name, value in part.items() if name != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _held(path: Path) -> dict[str, Any]:
    """What an earlier run left there; nothing if it can't be read, and is made again."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _check_smaller(folder: Path, size: Size) -> None:
    """Refuse to write a small run's table over a larger one's.

    Raises:
        ValueError: the folder holds the results of a larger size, or is no folder.
    """
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise ValueError(f"out: wanted a directory; got a file in {folder}")
    about = folder / "about.json"
    there = _held(about).get("size")
    if about.exists() and there not in SIZES:
        raise ValueError(
            f"{about}: wanted what a run writes; got something else: delete it if these results "
            "may be replaced"
        )
    if there in SIZES and SIZES.index(there) > SIZES.index(size):
        raise ValueError(
            f"out: wanted another directory for a {size} run; got {folder}, which holds {there} "
            "results"
        )


def _plain(value: Any) -> Any:
    """A JSON value; NaN becomes null, and infinity stays what Python's json writes for it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _frame(part: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(part["rows"], columns=part["columns"]).infer_objects()
    empty = [name for name in frame if frame[name].isna().all()]  # nothing but null: NaN again
    return frame.astype(dict.fromkeys(empty, float))


def _about(
    experiment: Experiment,
    subjects: Sequence[Subject],
    size: Size,
    parts: Sequence[Part],
    done: Sequence[dict[str, Any]],
    command: str,
) -> dict[str, Any]:
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "size": size,
        "command": command,
        "models": [{**s.columns, "digest": s.digest} for s in subjects],
        "settings": {p.key: dict(p.settings) for p in parts},
        "rows": sum(len(d["rows"]) for d in done),
        "budget_core_minutes": experiment.minutes[size],
        "cpu_seconds": round(sum(d["cpu_seconds"] for d in done), 1),
        "versions": {name: version(name) for name in VERSIONS},
    }


def _write(path: Path, text: str) -> None:
    """Whole or not at all, whoever else writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode("utf-8"))
