"""Train the models that the experiments compare, with one command.

    python -m qkvnorm_lens.experiments.train [NAME ...] [--out runs/study]

Each run goes on where it stopped, and is written with its card and log into
``qkvnorm_lens/experiments/models`` as it ends; what is there is not trained again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qkvnorm_lens.experiments.core import MODELS, runs
from qkvnorm_lens.training import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write the runs that are not there yet."""
    from qkvnorm_lens.training.checkpoints import install

    known = runs()
    parser = argparse.ArgumentParser(prog="python -m qkvnorm_lens.experiments.train")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(known)} [all]")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="state of the runs")
    parser.add_argument("--folder", type=Path, default=MODELS, help="where to write the models")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"NAME: wanted some of {sorted(known)}; got {unknown}")
    _threads(options.threads)
    for name in options.names or known:
        if (options.folder / name / "card.json").exists():
            continue
        out = options.out / name
        model = train(known[name], out)
        command = f"python -m qkvnorm_lens.experiments.train {name}"
        folder = options.folder / name
        rounded = name.startswith(("language-", "addition-"))  # the large ones, to halve a clone
        install(name, known[name], model, out / "log.csv", folder, command=command, rounded=rounded)
    return 0


def _threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)


if __name__ == "__main__":
    raise SystemExit(main())
