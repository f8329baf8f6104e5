"""Training runs of seconds, and when two are the same."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch

from qkvnorm_lens.models.config import named_config
from qkvnorm_lens.training.recipes import RECIPES, Recipe
from qkvnorm_lens.training.run import Run

TINY: dict[str, Any] = {"n_layers": 1, "d_model": 16, "d_head": 8, "n_heads": 2, "d_mlp": 16}


def tiny_run(recipe: str | Recipe = "modern", seed: int = 0, **options: Any) -> Run:
    settings: dict[str, Any] = {"steps": 13, "log_every": 4, "eval_every": 8, "eval_rows": 20}
    settings |= {k: options.pop(k) for k in list(options) if k in {"steps", "bf16", "split"}}
    cfg = named_config("study", "pre", **{**TINY, **options})
    if recipe in RECIPES:
        recipe = dataclasses.replace(RECIPES[recipe], batch_size=16)
    return Run(cfg, settings.pop("split", "pairs-train"), recipe, seed=seed, **settings)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]
