"""The models that the experiments compare: their configurations, seeds and training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from qkvnorm_lens.models import EXPERIMENT_MODELS, NormSpec, experiment_models, named_config
from qkvnorm_lens.training import Run, Split, Texts, get_recipe

SEEDS: Final = (1, 2, 3)
PLACEMENTS: Final = ("pre", "qkv", "none")
STUDY_SEEDS: Final = {"pre": 12, "qkv": 12, "none": 6}  # three decide little of sums
SHIPPED_SEEDS: Final = {"pre": 4, "qkv": 4}  # beside the shipped models, whose seed is 0
CENTRING_SEEDS: Final = 8
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

# Which vectors of a language model have a norm of their own; all else is equal.
LANGUAGE: Final[dict[str, tuple[str, NormSpec | None]]] = {
    "none": ("none", None),
    "pre": ("pre", None),
    "qk": ("qkv", NormSpec(on="qk")),
    "qkv": ("qkv", None),
}
LANGUAGE_STEPS: Final = 1_500

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


def shipped_run(placement: str, seed: int) -> Run:
    """Another seed of a shipped model: 4 layers of width 128, some twenty minutes of one core."""
    config = named_config("small", placement, seed=100 + seed)
    return Run(config, "small-train", "modern", steps=10_000, seed=seed, bf16=True)


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


def language_run(cell: str, seed: int) -> Run:
    """A language model: 4 layers of width 96, 3M tokens of old books, some five minutes.

    AdamW, as Muon's steps would cost more than the rest at this size.
    """
    placement, norm = LANGUAGE[cell]
    config = named_config("language", placement, norm=norm, seed=seed, attn_implementation="sdpa")
    recipe = dataclasses.replace(get_recipe("modern-adamw"), lr=4e-3, batch_size=16, warmup=100)
    return Run(
        config, Texts(), recipe, steps=LANGUAGE_STEPS, seed=seed, length_parts=1, log_every=50,
        eval_every=250, eval_rows=64,
    )  # fmt: skip


def runs() -> dict[str, Run]:
    """Every run by the name of its model, in the order in which they are trained."""
    study = {
        f"study-{p}-{seed}": study_run(p, seed)
        for seed in range(1, max(STUDY_SEEDS.values()) + 1)
        for p in PLACEMENTS
        if seed <= STUDY_SEEDS[p]
    }
    shipped = {
        f"addition-{p}-{seed}": shipped_run(p, seed)
        for seed in range(1, max(SHIPPED_SEEDS.values()) + 1)
        for p in SHIPPED_SEEDS
    }
    confound = {f"confound-{c}-{seed}": confound_run(c, seed) for seed in SEEDS for c in CONFOUNDS}
    centring = {
        f"{name}-{seed}": run(cell, seed)
        for seed in range(1, CENTRING_SEEDS + 1)
        for centred, control in CENTRING.items()
        for name, cell, run in (
            (f"confound-{control}", control, confound_run),
            (centred, centred, centring_run),
        )
    }
    order = {f"order-{c}-{seed}": order_run(c, seed) for seed in SEEDS for c in ORDERS}
    language = {f"language-{c}-{seed}": language_run(c, seed) for seed in SEEDS for c in LANGUAGE}
    return study | shipped | confound | centring | order | language


def trained(prefix: str = "") -> dict[str, Path]:
    """Directories of the trained models whose name starts so."""
    return {
        name: path for name, path in experiment_models(MODELS).items() if name.startswith(prefix)
    }
