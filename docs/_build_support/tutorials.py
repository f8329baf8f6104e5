"""The tutorials as pages of the site: their stored outputs, formulas as MathML."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter

_MATH = re.compile(r"`[^`]*`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+(?:\n[^$\n]+)?)\$", re.S)


def page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook in Markdown, and its pictures by name."""
    cells = nbformat.read(notebook, as_version=4)
    for cell in cells.cells:
        if cell.cell_type == "markdown":
            cell.source = _MATH.sub(_mathml, cell.source)
    body, resources = MarkdownExporter().from_notebook_node(cells)
    pictures = {f"{notebook.stem}_{name}": data for name, data in resources["outputs"].items()}
    return re.sub(r"!\[png\]\((\S+?)\)", rf"![figure]({notebook.stem}_\1)", body), pictures


def _mathml(found: re.Match[str]) -> str:
    """Browsers draw MathML without a script."""
    if found["block"]:
        return convert(found["block"].strip(), display="block")
    # In a span, or Markdown takes it for a block where a line begins with it.
    return f"<span>{convert(found['inline'])}</span>" if found["inline"] else found[0]
