"""Train the models that the experiments compare, with one command.

    python -m qkvnorm_lens.experiments.train [NAME ...] [--out runs/study]

Each run goes on where it stopped, and is written with its card and log into
``qkvnorm_lens/experiments/models`` as it ends; what is there is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qkvnorm_lens.addition import Split
from qkvnorm_lens.checkpoints import EXPERIMENT_MODELS, experiment_models
from qkvnorm_lens.config import named_config
from qkvnorm_lens.recipes import get_recipe
from qkvnorm_lens.training import Run, train

SEEDS: Final = (1, 2, 3)
PLACEMENTS: Final = ("pre", "qkv", "none")
CONFOUND_STEPS: Final = 4_000
# Cell of the confound experiment: placement, score scale, weight decay on gains too.
CONFOUNDS: Final[dict[str, tuple[str, str, bool]]] = {
    "pre": ("pre", "inv_sqrt", False),
    "qkv": ("qkv", "inv_sqrt", False),
    "pre-paper": ("pre", "calibrated", True),
    "qkv-paper": ("qkv", "calibrated", True),
    "qkv-calibrated": ("qkv", "calibrated", False),
    "qkv-learned": ("qkv", "learned", False),
}
# With the spectral gap taken away; their control is the confound cell of the same placement.
CENTRING: Final = {"centred-pre": "pre"}
# Sums of two integers of three digits: positions, and which updates have a skip connection.
ORDER_STEPS: Final = 3_000
ORDERS: Final[dict[str, tuple[str, str]]] = {
    "rotary": ("rotary", "both"),
    "rotary-no-skip": ("rotary", "none"),
    "nope": ("none", "both"),
    "nope-no-attn": ("none", "mlp"),
    "nope-no-skip": ("none", "none"),
}
MODELS: Final = EXPERIMENT_MODELS


def study_run(placement: str, seed: int) -> Run:
    """A study model: 2 layers of width 64, 16,000 steps, some eleven minutes of one core.

    No-Norm trains badly at the recipe's rate (docs/training.md), so it has the rate of the shipped
    models.
    """
    config = named_config("study", placement, seed=seed)
    recipe = get_recipe("study")
    if placement == "none":
        recipe = dataclasses.replace(recipe, lr=get_recipe("modern").lr)
    return Run(config, "small-train", recipe, steps=16_000, seed=seed, bf16=True)


def confound_run(cell: str, seed: int) -> Run:
    """A cell of the confound experiment: the study model, 4,000 steps, some three minutes."""
    placement, scale, decay = CONFOUNDS[cell]
    config = named_config("study", placement, seed=seed, score_scale=scale)
    recipe = dataclasses.replace(get_recipe("study"), decay_all=decay)
    return Run(config, "small-train", recipe, steps=CONFOUND_STEPS, seed=seed, bf16=True)


def centring_run(cell: str, seed: int) -> Run:
    """A confound cell with the fix of the spectral gap."""
    control = confound_run(CENTRING[cell], seed)
    config = named_config("study", CENTRING[cell], seed=seed, centred=True)
    return dataclasses.replace(control, config=config)


def order_run(cell: str, seed: int) -> Run:
    """Three-digit addition with and without positions and skip connections, some two minutes."""
    positions, skip = ORDERS[cell]
    config = named_config("study", "pre", seed=seed, positional_embedding_type=positions, skip=skip)
    split = Split((2,), (3,), signed=False)
    return Run(config, split, get_recipe("study"), steps=ORDER_STEPS, seed=seed, bf16=True)


def runs() -> dict[str, Run]:
    """Every run by the name of its model, in the order in which they are trained."""
    study = {f"study-{p}-{seed}": study_run(p, seed) for seed in SEEDS for p in PLACEMENTS}
    confound = {f"confound-{c}-{seed}": confound_run(c, seed) for seed in SEEDS for c in CONFOUNDS}
    centring = {f"{c}-{seed}": centring_run(c, seed) for seed in SEEDS for c in CENTRING}
    order = {f"order-{c}-{seed}": order_run(c, seed) for seed in SEEDS for c in ORDERS}
    return study | confound | centring | order


def trained(prefix: str = "") -> dict[str, Path]:
    """Directories of the trained models whose name starts so."""
    return {
        name: path for name, path in experiment_models(MODELS).items() if name.startswith(prefix)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write the runs that are not there yet."""
    from qkvnorm_lens.checkpoints.make import install

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
        install(name, known[name], model, out / "log.csv", folder, command=command)
    return 0


def _threads(n: int) -> None:
    import torch

    torch.set_num_threads(n)


if __name__ == "__main__":
    raise SystemExit(main())
