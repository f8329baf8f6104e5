"""The page of all results beside the published ones, made from the files that experiments wrote.

Nothing on it is typed in: every number comes from a ``table.csv`` under the results' directory,
through the experiment's own ``text`` and ``claims``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qkvnorm_lens.experiments.core.base import Claim
from qkvnorm_lens.experiments.core.registry import NAMES, get_experiment
from qkvnorm_lens.experiments.core.running import read_table
from qkvnorm_lens.experiments.core.studies import trained
from qkvnorm_lens.models import checkpoint_path

HEAD = """\
# Reproduction

What became of each published number and figure of Menary, Kaski and Freitas (arXiv 2406.17837),
what their open questions gave, and the measurements of three related papers: rank collapse (Wu et
al., arXiv 2405.18781), the spectral gap (Naderi et al., arXiv 2410.07799) and permutation symmetry
(Zuo and Guerzhoy, arXiv 2402.05969). This page is made by `{command}` from the files under
`{results}`, each of which says the command, configuration, seeds and versions that it came from.

**Scale.** The paper's Baseline has 10 layers of width 512 (about 21.6M parameters) and was trained
on 110M sums of 3 to 6 numbers with 2 or 3 digits. {ours} Where the paper's numbers hang on size,
ours can't confirm or refute them; the column "same" is about what is stated, at our size.
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


def write_report(folder: Path, page: Path) -> Path:
    """Write the page; gives back its path.

    Raises:
        ValueError: no results under the directory.
    """
    found = results(folder)
    text = compose(found, folder, page)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page


def compose(found: list[Path], folder: Path, page: Path) -> str:
    """The page's text."""
    command = (
        f"qkvnorm-lens experiment report --out {folder.name} --to {page.parent.name}/{page.name}"
    )
    sections = [HEAD.format(command=command, results=folder.name, ours=_scale())]
    claims: list[tuple[str, Claim]] = []
    chapters = []
    for path in found:
        experiment = get_experiment(path.name)
        about = _whole(path)
        table = read_table(path)
        # What needs no model is in the results of each kind of model, and counts once.
        found_here = [(path.name, claim) for claim in experiment.claims(table)]
        claims += [each for each in found_here if each not in claims]
        figure = os.path.relpath(path / "figure.png", page.parent)
        where = os.path.relpath(path, page.parent)
        chapters.append(
            f"## {experiment.title}{_among(path, found, folder)}{_size(about)}\n\n"
            f"{experiment.source}. `{about['command']}`; {_cost(about)}. "
            f"[Table]({where}/table.csv), [settings]({where}/about.json).\n\n"
            f"![{experiment.title}]({figure})\n\n{experiment.text(table).rstrip()}\n"
        )
    missing = [name for name in NAMES if name not in {path.name for path in found}]
    if missing:
        sections.append(f"**Not here yet**: {', '.join(missing)}.\n")
    sections.append(_summary(claims))
    return "\n".join([*sections, *chapters])


def _whole(path: Path) -> dict[str, Any]:
    """What ``about.json`` says.

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
    found = len(read_table(path))
    if found != rows:
        raise ValueError(f"{path / 'table.csv'}: wanted {rows} rows; got {found}")
    return about


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


def _among(path: Path, found: list[Path], folder: Path) -> str:
    """Which set of models, where there are several for one experiment."""
    same = [p for p in found if p.name == path.name]
    return "" if len(same) == 1 else f": {path.relative_to(folder).parent}"


def _size(about: dict[str, Any]) -> str:
    return "" if about["size"] == "full" else f" ({about['size']} form)"


def _cost(about: dict[str, Any]) -> str:
    minutes = about["cpu_seconds"] / 60
    return f"{minutes:.1f} core-minutes of a budget of {about['budget_core_minutes']:g}"


def _summary(claims: list[tuple[str, Claim]]) -> str:
    lines = ["## Published and ours", ""]
    lines += ["| from | what | published | ours | same | why |", "|---|---|---|---|---|---|"]
    for name, claim in claims:
        cells = [name, claim.what, claim.published, claim.ours, f"**{claim.same}**", claim.why]
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
