"""A training run: configuration, task, recipe, steps; and how its model is measured."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from hooks.arguments import SEEDS, check_booleans, check_device, check_integers, check_kind
from qkvnorm_lens.models import QKVNormConfig
from qkvnorm_lens.training.addition import (
    Accuracy,
    AccuracyCounter,
    Batch,
    Split,
    draw,
    get_split,
)
from qkvnorm_lens.training.language import Texts, score
from qkvnorm_lens.training.recipes import Recipe, get_recipe

TEST_SEED: Final = 2406_17837


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, whole: the same run gives the same weights on the same machine.

    Args:
        config: the model.
        split: which sums; or a `Texts`, for a language model.
        recipe: a name in ``RECIPES``, or a `Recipe`.
        steps: how many.
        seed: of the data (the weights' is ``config.seed``).
        bf16: matrix products in bfloat16, weights and sums in float32.
        length_parts: batches are cut by length into this many parts, which saves padding and
            changes nothing else.
        log_every: steps between rows of the log.
        eval_every: steps between measurements of accuracy.
        eval_rows: sums, or windows of held-out text, in each of them.
    """

    config: QKVNormConfig
    split: str | Split | Texts
    recipe: str | Recipe = "modern"
    steps: int = 10_000
    seed: int = 0
    bf16: bool = False
    length_parts: int = 2
    log_every: int = 100
    eval_every: int = 1000
    eval_rows: int = 4000

    def __post_init__(self) -> None:
        check_kind("config", self.config, QKVNormConfig, "a QKVNormConfig")
        recipe = get_recipe(self.recipe)
        task = get_task(self.split)
        if self.config.n_ctx < (wanted := task.max_length):
            what = "windows" if isinstance(task, Texts) else "sums"
            raise ValueError(
                f"n_ctx: wanted at least {wanted} tokens for these {what}; got {self.config.n_ctx}"
            )
        names = ("steps", "length_parts", "log_every", "eval_every", "eval_rows")
        whole: dict[str, Any] = {name: (getattr(self, name), 1) for name in names}
        whole["seed"] = (self.seed, 0, SEEDS)
        for name, value in zip(whole, check_integers(**whole), strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "bf16", *check_booleans(bf16=self.bf16))
        if recipe.batch_size < self.length_parts:
            raise ValueError(
                f"length_parts: wanted at most batch_size = {recipe.batch_size}; got "
                f"{self.length_parts}"
            )


def get_task(split: str | Split | Texts) -> Split | Texts:
    """The sums of that name, or a task as it is.

    Raises:
        ValueError: no such name; the message lists them.
    """
    return split if isinstance(split, Texts) else get_split(split)


def rows_of(task: Split | Texts, n: int, seed: tuple[int, ...]) -> Batch:
    """Rows of a task, drawn from a seed."""
    return task.draw(n, seed=seed) if isinstance(task, Texts) else draw(task, n, seed=seed)


def measured(
    model: nn.Module, task: Split | Texts, rows: int, device: str | torch.device
) -> dict[str, float]:
    """What the log says of a model besides its loss: `SCORES`."""
    if isinstance(task, Texts):
        found: Any = score(model, task.length, windows=rows, device=device)
    else:
        found = evaluate(model, task, rows=rows, device=device)
    return {k: v for k, v in dataclasses.asdict(found).items() if k in SCORES[type(task)]}


SCORES: Final[dict[type, tuple[str, ...]]] = {
    Split: ("per_token", "per_token_without_end", "exact"),
    Texts: ("held_out", "per_token"),
}


def positions_for(
    config: QKVNormConfig, tokens: Int[torch.Tensor, "batch pos"], seed: tuple[int, ...]
) -> Int[torch.Tensor, "#batch pos"]:
    """0, 1, .., each row shifted by its own random integer where positions are sinusoids.

    Menary et al. 2024, appendix on training.
    """
    positions = torch.arange(tokens.shape[1])[None]
    spec = config.sinusoids
    if spec is None or not spec.max_shift:
        return positions
    shift = np.random.default_rng(seed).integers(spec.max_shift + 1, size=(len(tokens), 1))
    return positions + torch.from_numpy(shift)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: str | Split,
    *,
    rows: int = 4000,
    seed: int | tuple[int, ...] = TEST_SEED,
    batch_size: int = 1000,
    device: str | torch.device = "cpu",
) -> Accuracy:
    """Teacher-forced accuracy on freshly drawn sums (Menary et al. 2024, Section 4).

    Works on a bridge too. The model's training mode is restored.
    """
    check_kind("model", model, nn.Module, "a model of torch")
    rows, batch_size = check_integers(rows=(rows, 1), batch_size=(batch_size, 1))
    check_device("device", device)
    was_training = model.training
    model.eval()
    try:
        counter = AccuracyCounter()
        whole = draw(split, rows, seed=seed)
        for part in whole.by_length(math.ceil(rows / batch_size)):
            batch = part.to(device)
            counter.update(model(batch.tokens).float(), batch.targets)
        return counter.result()
    finally:
        model.train(was_training)


def processes(device: str) -> int:
    """How many processes share the work: 1, unless accelerate or torchrun started more."""
    from accelerate import PartialState

    return int(PartialState(cpu=torch.device(device).type == "cpu").num_processes)


def describe(run: Run, processes: int = 1) -> dict[str, Any]:
    """What identifies a run, in JSON types; each of the `processes` has its own batch."""
    return {
        "config": run.config.to_json(),
        "split": get_task(run.split).to_json(),
        "recipe": dataclasses.asdict(get_recipe(run.recipe)),
        "steps": run.steps,
        "seed": run.seed,
        "bf16": run.bf16,
        "length_parts": run.length_parts,
        "processes": processes,
    }


def sequences(run: Run, processes: int = 1) -> int:
    """How many sums, or windows, a run trains on."""
    return run.steps * get_recipe(run.recipe).batch_size * processes
