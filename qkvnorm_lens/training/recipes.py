"""Optimizers and learning rates: Menary et al. 2024 (arXiv 2406.17837), and modern ones."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import torch
from torch import nn

from hooks.arguments import (
    brief,
    check_booleans,
    check_choice,
    check_integers,
    check_number,
    read_list,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the weights are updated.

    Args:
        optimizer: ``"adamw"``, or ``"muon"`` (orthogonalised momentum for the matrices inside the
            blocks, AdamW for the rest).
        lr: the highest learning rate.
        schedule: ``"plateau"`` halves it after `patience` epochs of `epoch` steps without a better
            training loss; ``"cosine"`` warms up over `warmup` steps and falls to a hundredth at the
            end.
        batch_size: sums per step and process.
        weight_decay: on every parameter (``decay_all``) or on matrices only.
        betas: of AdamW.
        clip: largest norm of the gradient; 0 for none.
    """

    optimizer: str
    lr: float
    schedule: str
    batch_size: int = 128
    weight_decay: float = 0.01
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    warmup: int = 200
    epoch: int = 2000
    patience: int = 3

    def __post_init__(self) -> None:
        whole = {n: (getattr(self, n), 1) for n in ("batch_size", "warmup", "epoch", "patience")}
        read: dict[str, Any] = dict(zip(whole, check_integers(**whole), strict=True))
        read["optimizer"] = check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        read["schedule"] = check_choice("schedule", self.schedule, ("plateau", "cosine"))
        read["lr"] = check_number("lr", self.lr, "a number > 0", lambda x: 0 < x < math.inf)
        for name in ("weight_decay", "clip"):
            value, wanted = getattr(self, name), "a finite number >= 0"
            read[name] = check_number(name, value, wanted, lambda x: 0 <= x < math.inf)
        (read["decay_all"],) = check_booleans(decay_all=self.decay_all)
        wanted = "two numbers from 0 to below 1"
        betas = read_list("betas", self.betas, wanted)
        read["betas"] = tuple(check_number("betas", b, wanted, lambda x: 0 <= x < 1) for b in betas)
        if len(betas) != 2:
            raise ValueError(f"betas: wanted {wanted}; got {brief(self.betas)}")
        for name, value in read.items():
            object.__setattr__(self, name, value)


RECIPES: Final[dict[str, Recipe]] = {
    "paper": Recipe("adamw", lr=3e-4, schedule="plateau", decay_all=True),
    "modern": Recipe("muon", lr=4e-3, schedule="cosine", betas=(0.9, 0.98), clip=1.0),
    "study": Recipe("muon", lr=1e-2, schedule="cosine", betas=(0.9, 0.98), clip=1.0),
    "modern-adamw": Recipe("adamw", lr=2e-3, schedule="cosine", betas=(0.9, 0.98), clip=1.0),
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe with this name.

    Raises:
        ValueError: no such name; the message lists them.
    """
    if isinstance(recipe, Recipe):
        return recipe
    return RECIPES[check_choice("recipe", recipe, sorted(RECIPES))]


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The recipe's optimizers.

    Raises:
        ValueError: ``"muon"`` with a torch that lacks it.
    """
    matrices = {
        id(m.weight)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "layers." in name
    }
    if recipe.optimizer == "adamw":
        by_muon = set[int]()
    elif not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f'optimizer: "muon" wants torch 2.9 or later, got {torch.__version__}; '
            'the recipe "modern-adamw" does without'
        )
    else:
        by_muon = matrices
    params = list(model.parameters())
    rest = [p for p in params if id(p) not in by_muon]
    decayed = [p for p in rest if recipe.decay_all or id(p) in matrices]
    plain = [p for p in rest if not (recipe.decay_all or id(p) in matrices)]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, recipe.weight_decay), (plain, 0.0))
        if group
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    ]
    if by_muon:
        muon = torch.optim.Muon(
            [p for p in params if id(p) in by_muon],
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
    return optimizers


class LearningRate:
    """The schedule: cosine with warm-up, or halving on a plateau of the training loss."""

    def __init__(self, recipe: Recipe, steps: int) -> None:
        self.recipe = recipe
        self.steps = steps
        self.state = {"factor": 1.0, "best": math.inf, "bad": 0.0, "sum": 0.0, "n": 0.0}

    def at(self, step: int) -> float:
        """The learning rate of this step."""
        if self.recipe.schedule == "plateau":
            return self.recipe.lr * self.state["factor"]
        up = min(1.0, (step + 1) / self.recipe.warmup)
        down = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.recipe.lr * up * (0.01 + 0.99 * down)

    def saw(self, loss: float) -> None:
        """Record one step's loss."""
        s = self.state
        s["sum"], s["n"] = s["sum"] + loss, s["n"] + 1
        if s["n"] < self.recipe.epoch:
            return
        mean, s["sum"], s["n"] = s["sum"] / s["n"], 0.0, 0.0
        if mean < s["best"]:
            s["best"], s["bad"] = mean, 0.0
            return
        s["bad"] += 1
        if s["bad"] >= self.recipe.patience:
            s["factor"], s["bad"] = s["factor"] / 2, 0.0
