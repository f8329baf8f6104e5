"""Draw the training curves of the shipped models, with one command.

    python -m qkvnorm_lens.experiments.curves --out docs/figures/training.png

Reads the logs that come with them; names pick some, in their order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qkvnorm_lens.models import checkpoint_path, checkpoints
from qkvnorm_lens.plots import training_curves


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figure, in the form that the file's name asks for."""
    parser = argparse.ArgumentParser(prog="python -m qkvnorm_lens.experiments.curves")
    parser.add_argument("names", nargs="*", metavar="NAME", help="shipped models [all]")
    parser.add_argument("--out", type=Path, required=True, help="a .png, .svg or .pdf")
    options = parser.parse_args(arguments)
    try:
        logs = {name: checkpoint_path(name) / "log.csv" for name in options.names or checkpoints()}
    except ValueError as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    training_curves(logs).savefig(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
