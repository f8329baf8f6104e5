"""Pages of all results beside the published ones, made from the files that experiments wrote.

Nothing on them is typed in: every number comes from a ``table.csv`` under the results' directory,
through the experiment's own ``text`` and ``claims``.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from qkvnorm_lens.arguments import directory
from qkvnorm_lens.experiments.core.base import Claim
from qkvnorm_lens.experiments.core.grouped import markdown
from qkvnorm_lens.experiments.core.registry import NAMES, get_experiment
from qkvnorm_lens.experiments.core.running import read_table
from qkvnorm_lens.experiments.core.studies import runs, trained
from qkvnorm_lens.models import checkpoint_path

INDEX: Final = "index.md"
SAME: Final = ("yes", "in part", "no", "not decided", "-")
HEAD: Final = """\
# Reproduction

How each published number and figure of Menary, Kaski and Freitas (arXiv 2406.17837) compares with
ours, what their open questions gave, and the measurements of three related papers: rank collapse
(Wu et al., arXiv 2405.18781), the spectral gap (Naderi et al., arXiv 2410.07799) and permutation
symmetry (Zuo and Guerzhoy, arXiv 2402.05969). This page and those of the experiments are made by
`{command}` from the files under `{results}`. Each file records the command, configuration, seeds
and versions that it came from.

**Scale.** The paper's Baseline has 10 layers of width 512 (about 21.6M parameters) and was trained
on 110M sums of 3 to 6 numbers with 2 or 3 digits. {ours} Where the paper's numbers depend on size,
ours can't confirm or refute them; the column "same" is about what is stated, at our size.

**Intervals** are of 95%, over seeds unless a page says otherwise: "97.8 ± 0.4" of Student's t, or
of Welch's between groups. Those of shares (accuracy, sparse rows, rates) lie within 0 and 100%, as
t would not: Wilson's score interval, with the variance of the seeds and t. Where its sides differ
both ends are given, "0.8 (0.0 to 14.3)". Seeds that all gave 0, or all 100%, have no width: what
is rare they can miss.
"""


def results(folder: Path) -> list[Path]:
    """Directories of finished experiments below a directory, in the order of `NAMES`.

    Raises:
        ValueError: there are none.
    """
    found = sorted(path.parent for path in folder.rglob("about.json"))
    found = [path for path in found if path.name in NAMES and (path / "table.csv").is_file()]
    if not found:
        raise ValueError(f"--out: wanted a directory with results of experiments; got {folder}")
    return sorted(found, key=lambda path: (NAMES.index(path.name), str(path)))


def write_report(folder: Path, to: Path) -> Path:
    """Write a page for each experiment and one with all claims; gives back the latter's path.

    Args:
        folder: directory with results.
        to: directory of the pages.

    Raises:
        ValueError: no results under the directory.
        OSError: the second is a file, or can't be written.
    """
    directory("to", to)
    texts = compose(results(folder), folder, to)
    to.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (to / name).write_text(text, encoding="utf-8")
    return to / INDEX


def compose(found: list[Path], folder: Path, to: Path) -> dict[str, str]:
    """The pages by file name: a summary of all claims first, then one page for each experiment."""
    names = list(dict.fromkeys(path.name for path in found))
    chapters = [_chapter(name, [p for p in found if p.name == name], folder, to) for name in names]
    command = f"qkvnorm-lens experiment report --out {folder.name} --to {to.parent.name}/{to.name}"
    sections = [HEAD.format(command=command, results=folder.name, ours=_scale())]
    missing = [name for name in NAMES if name not in names]
    if missing:
        sections.append(f"**Not here yet**: {', '.join(missing)}.\n")
    sections.append(_summary(chapters))
    pages = {f"{chapter.name}.md": chapter.page for chapter in chapters}
    return {INDEX: "\n".join(sections), **pages}


@dataclass(frozen=True)
class Chapter:
    """What one experiment's results say.

    Attributes:
        name: the experiment.
        title: what it shows.
        claims: each once, whatever models it was made on.
        page: the text.
    """

    name: str
    title: str
    claims: list[Claim]
    page: str


def _chapter(name: str, paths: list[Path], folder: Path, to: Path) -> Chapter:
    """The page of one experiment; a section for each set of models, where there are several."""
    experiment = get_experiment(name)
    claims: list[Claim] = []
    sections = []
    for path in paths:
        about, table = _whole(path)
        # What needs no model is in the results of each kind of model, and counts once.
        claims += [each for each in experiment.claims(table) if each not in claims]
        where = os.path.relpath(path, to)
        of = f"## {path.relative_to(folder).parent}\n\n" if len(paths) > 1 else ""
        form = "" if about["size"] == "full" else f" ({about['size']} form)"
        sections.append(
            f"{of}`{about['command']}`{form}; {_cost(about)}. [Table]({where}/table.csv), "
            f"[settings]({where}/about.json).{_seeds(about)}\n\n![{experiment.title}]({where}/figure.png)\n\n{experiment.text(table).rstrip()}\n"
        )
    head = f"# {experiment.title}\n\n{experiment.source}. [All results]({INDEX}).\n"
    if claims:
        rows = [[c.what, c.published, c.ours, f"**{c.same}**", _why(c)] for c in claims]
        head += "\n" + _table(["what", "published", "ours", "same", "why"], rows)
    return Chapter(name, experiment.title, claims, "\n".join([head, *sections]))


def _summary(chapters: list[Chapter]) -> str:
    """How often each verdict was given, and every claim with a link to its page."""
    verdicts = Counter(claim.same for chapter in chapters for claim in chapter.claims)
    counted = ", ".join(f"{same} {n}" for same in SAME if (n := verdicts[same]))
    rows = [
        [f"[{chapter.name}]({chapter.name}.md)", c.what, c.published, c.ours, f"**{c.same}**"]
        for chapter in chapters
        for c in chapter.claims
    ]
    pages = [[f"[{c.name}]({c.name}.md)", c.title] for c in chapters]
    return (
        "## Published and ours\n\n"
        f"The same: {counted} (-: nothing was published). Each page says why.\n\n"
        f"{_table(['from', 'what', 'published', 'ours', 'same'], rows)}\n"
        f"## Pages\n\n{_table(['page', 'what it shows'], pages)}"
    )


def _why(claim: Claim) -> str:
    """Why; of an open claim also what would decide it."""
    return f"{claim.why}; {claim.power}" if claim.same == "not decided" else claim.why


def _table(head: list[str], rows: list[list[str]]) -> str:
    return markdown(head, [[_cell(text) for text in row] for row in rows]) + "\n"


def _whole(path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """What ``about.json`` says, and the table.

    Raises:
        ValueError: it or the figure can't be read, or the table is not the one that it is about.
    """
    try:
        about: dict[str, Any] = json.loads((path / "about.json").read_text(encoding="utf-8"))
        rows = about["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / 'about.json'}: wanted what an experiment wrote; got {error!r}"
        ) from error
    if not (path / "figure.png").is_file():
        raise ValueError(f"{path}: wanted figure.png; got none")
    table = read_table(path)
    if len(table) != rows:
        raise ValueError(f"{path / 'table.csv'}: wanted {rows} rows; got {len(table)}")
    return about, table


def _scale() -> str:
    """Size and training of our models, from their cards."""
    out = []
    for what, path in (
        ("The *study* models", trained("study-").get("study-pre-1")),
        ("The shipped *addition* models", checkpoint_path("addition-pre")),
    ):
        if path is None:
            continue
        card = json.loads((path / "card.json").read_text(encoding="utf-8"))
        config, split = card["run"]["config"], card["run"]["split"]
        counts, digits = (" or ".join(map(str, split[k])) for k in ("counts", "digits"))
        out.append(
            f"{what} have {config['n_layers']} layers of width {config['d_model']} "
            f"({card['parameters'] / 1e6:.2g}M parameters) and were trained on "
            f"{card['sequences'] / 1e6:.2g}M sums of {counts} numbers with {digits} digits."
        )
    return " ".join(out)


def _cost(about: dict[str, Any]) -> str:
    minutes = about["cpu_seconds"] / 60
    return f"{minutes:.1f} core-minutes of a budget of {about['budget_core_minutes']:g}"


def _seeds(about: dict[str, Any]) -> str:
    """``Seeds: 1, 2, 3 of study-pre and study-qkv``; of what an experiment draws itself too."""
    by: defaultdict[str, set[int]] = defaultdict(set)
    for model in about["models"]:
        if model["seed"] >= 0:  # else nobody knows it
            by[model["group"]].add(model["seed"])
    known = runs()
    for key, settings in about["settings"].items():
        if key in known:  # trained for the experiment
            group, _, seed = key.rpartition("-")
            by[group].add(int(seed))
        drawn = settings.get("seeds", ())
        if own := range(drawn) if isinstance(drawn, int) else drawn:
            by["what is made here"].update(own)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for group, seeds in by.items():
        low, high = min(seeds), max(seeds)
        named = f"{low} to {high}" if len(seeds) == high - low + 1 > 5 else _list(sorted(seeds))
        groups[named].append(group)
    said = "; ".join(f"{seeds} of {_list(names)}" for seeds, names in groups.items())
    return f" Seeds: {said}." if said else ""


def _list(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
