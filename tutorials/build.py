"""Run the tutorials and write the notebooks beside their scripts.

A tutorial is written in `NN_name.py` (jupytext, percent format) and shown as `NN_name.ipynb`:

    python tutorials/build.py                   # all
    python tutorials/build.py 01 05             # these

A notebook keeps figures as pictures. What turns (circuitsvis, plotly) is kept as its static twin,
or as a line that says to run the cell: code hosts don't run scripts.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SCRIPTS = sorted(HERE.glob("[0-9][0-9]_*.py"))
INTERACTIVE = "Interactive: run the cell to see it."
METADATA = {  # the same on every machine
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_KEPT = ("image/png", "image/svg+xml", "text/html", "text/markdown", "text/plain")


def read(script: Path) -> Any:
    """The script as a notebook without outputs; cells have the same ids each time."""
    notebook = jupytext.read(script)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    return notebook


def execute(notebook: Any) -> Any:
    """Run every cell, in this folder and without a network; an error in a cell is raised."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=300,
        resources={"metadata": {"path": str(HERE)}},
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns of its own local sockets
    ).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined([_stored(output) for output in cell.outputs])
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of a stream as one: where it is cut hangs on the kernel's timing."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.get("name") and joined[-1].get("name") == output["name"]:
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def _stored(output: Any) -> Any:
    """The output as a code host can show it."""
    data = output.get("data")
    if data is None:
        return output
    script = "<script" in data.get("text/html", "") or "<iframe" in data.get("text/html", "")
    if script or "application/vnd.plotly.v1+json" in data:
        data = {"text/plain": INTERACTIVE}
    output["data"] = {kind: data[kind] for kind in _KEPT if kind in data}
    output["metadata"] = {}
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", help="01, 02, ... [all]")
    numbers = parser.parse_args().numbers
    for script in SCRIPTS:
        if numbers and script.name[:2] not in numbers:
            continue
        start = time.perf_counter()
        path = script.with_suffix(".ipynb")
        nbformat.write(execute(read(script)), path)
        size = path.stat().st_size / 1e6
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {size:.2f} MB")


if __name__ == "__main__":
    main()
