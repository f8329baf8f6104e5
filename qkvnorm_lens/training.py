"""Training on addition, with the recipe of Menary et al. 2024 or a modern one.

    loss = - sum over scored positions of log p(target) / their number

Menary et al. 2024 (arXiv 2406.17837), appendix on training. A run is a pure function of its `Run`:
the rows of a step are drawn from (seed, process, step), so a run that was killed and goes on ends
with the same bits as one that was not, and no global random state matters.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import nn
from tqdm import tqdm

from qkvnorm_lens.addition import Accuracy, AccuracyCounter, Batch, Split, draw, get_split
from qkvnorm_lens.config import QKVNormConfig
from qkvnorm_lens.model import QKVNormTransformer

TEST_SEED: Final = 2406_17837
_TRAIN_STREAM, _SHIFT_STREAM, _CALIBRATION_STREAM = 1, 2, 3
_FIELDS: Final = (
    "step",
    "sequences",
    "seconds",
    "lr",
    "loss",
    "per_token",
    "per_token_without_end",
    "exact",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the weights are moved.

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
        for name, value, valid in (
            ("optimizer", self.optimizer, ("adamw", "muon")),
            ("schedule", self.schedule, ("plateau", "cosine")),
        ):
            if value not in valid:
                raise ValueError(f"{name}: wanted one of {valid}, got {value!r}")
        for number in ("lr", "batch_size", "warmup", "epoch", "patience"):
            if getattr(self, number) <= 0:
                raise ValueError(f"{number}: wanted more than 0, got {getattr(self, number)}")


RECIPES: Final[dict[str, Recipe]] = {
    "paper": Recipe("adamw", lr=3e-4, schedule="plateau", decay_all=True),
    "modern": Recipe("muon", lr=4e-3, schedule="cosine", betas=(0.9, 0.98), clip=1.0),
    "modern-adamw": Recipe("adamw", lr=2e-3, schedule="cosine", betas=(0.9, 0.98), clip=1.0),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, whole: the same run gives the same weights on the same machine.

    Args:
        config: the model.
        split: which sums.
        recipe: a name in ``RECIPES``, or a `Recipe`.
        steps: how many.
        seed: of the data (the weights' is ``config.seed``).
        bf16: matrix products in bfloat16, weights and sums in float32.
        length_parts: batches are cut into so many by length, which saves padding and changes
            nothing else.
        log_every: steps between rows of the log.
        eval_every: steps between measurements of accuracy.
        eval_rows: sums in each of them.
    """

    config: QKVNormConfig
    split: str | Split
    recipe: str | Recipe = "modern"
    steps: int = 10_000
    seed: int = 0
    bf16: bool = False
    length_parts: int = 2
    log_every: int = 100
    eval_every: int = 1000
    eval_rows: int = 4000

    def __post_init__(self) -> None:
        recipe = get_recipe(self.recipe)
        wanted = get_split(self.split).max_length
        if self.config.n_ctx < wanted:
            raise ValueError(
                f"n_ctx: these sums want at least {wanted} tokens, got {self.config.n_ctx}"
            )
        for name in ("steps", "length_parts", "log_every", "eval_every", "eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if recipe.batch_size < self.length_parts:
            raise ValueError(
                f"length_parts: wanted at most batch_size = {recipe.batch_size}, got "
                f"{self.length_parts}"
            )


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: no such name; the message lists them.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe: wanted one of {sorted(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe]


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
        """Take note of one step's loss."""
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

    Works on a bridge too. The model's training mode is put back.
    """
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


class Trainer:
    """A `Run` on its way; `train` is the usual door."""

    def __init__(
        self, run: Run, out: Path, *, device: str = "cpu", compile_model: bool = False
    ) -> None:
        from accelerate import Accelerator

        self.run = run
        self.recipe = get_recipe(run.recipe)
        self.split = get_split(run.split)
        self.out = out
        self.accelerator = Accelerator(cpu=torch.device(device).type == "cpu")
        several = self.accelerator.num_processes > 1
        self.device = self.accelerator.device if several else torch.device(device)
        self.model = QKVNormTransformer(run.config).to(self.device)
        self.optimizers = make_optimizers(self.model, self.recipe)
        self.rate = LearningRate(self.recipe, run.steps)
        self.step = 0
        self.seconds = 0.0
        self.loss_sum = 0.0
        forward: nn.Module = self.model
        if several:
            forward = self.accelerator.prepare_model(self.model)
        if compile_model:
            forward = cast(nn.Module, torch.compile(forward, dynamic=True))
        self.forward = forward
        out.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self._load()
        elif run.config.calibrated or run.config.score_scale == "calibrated":
            self._calibrate()

    @property
    def state_path(self) -> Path:
        """Where the state that a killed run goes on from is kept."""
        return self.out / "state.pt"

    @property
    def log_path(self) -> Path:
        """Where the log is kept."""
        return self.out / "log.csv"

    def _calibrate(self) -> None:
        rows = draw(self.split, self.recipe.batch_size, seed=(self.run.seed, _CALIBRATION_STREAM))
        batch = rows.to(self.device)
        positions = positions_for(
            self.run.config, rows.tokens, (self.run.seed, _CALIBRATION_STREAM, 0)
        )
        with self.model.calibrating():
            self.model(batch.tokens, position_ids=positions.to(self.device))

    def one_step(self) -> float:
        """Draw the rows of this step, and move the weights."""
        run, rank = self.run, self.accelerator.process_index
        self.model.train()
        lr = self.rate.at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        batch = draw(
            self.split, self.recipe.batch_size, seed=(run.seed, _TRAIN_STREAM, rank, self.step)
        )
        n_scored = int(batch.scored.sum())
        parts = batch.by_length(run.length_parts)
        loss = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            seed = (run.seed, _SHIFT_STREAM, rank, self.step, i)
            with self._no_sync(i + 1 < len(parts)):
                part_loss = self._loss(part, seed) / n_scored
                part_loss.backward()
            loss += part_loss.detach()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = float(self.accelerator.reduce(loss, "mean"))
        self.rate.saw(value)
        self.loss_sum += value
        self.step += 1
        return value

    def _no_sync(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        if wanted and self.accelerator.num_processes > 1:
            return cast(
                contextlib.AbstractContextManager[None], self.accelerator.no_sync(self.forward)
            )
        return contextlib.nullcontext()

    def _loss(self, part: Batch, seed: tuple[int, ...]) -> torch.Tensor:
        """Summed over scored positions; only their logits are made."""
        positions = positions_for(self.run.config, part.tokens, seed).to(self.device)
        batch = part.to(self.device)
        at = batch.scored.nonzero(as_tuple=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            logits = self.forward(batch.tokens, position_ids=positions, at=at)
        return F.cross_entropy(logits.float(), batch.targets[at], reduction="sum")

    def write_log(self) -> None:
        """One row, with accuracy if it is due."""
        run = self.run
        row: dict[str, Any] = {
            "step": self.step,
            "sequences": self.step * self.recipe.batch_size * self.accelerator.num_processes,
            "seconds": round(self.seconds, 1),
            "lr": self.rate.at(self.step - 1),
            "loss": self.loss_sum / ((self.step - 1) % run.log_every + 1),
        }
        self.loss_sum = 0.0
        if self.step % run.eval_every == 0 or self.step == run.steps:
            accuracy = evaluate(self.model, self.split, rows=run.eval_rows, device=self.device)
            row |= {k: v for k, v in dataclasses.asdict(accuracy).items() if k in _FIELDS}
        new = not self.log_path.exists()
        with self.log_path.open("a", newline="") as file:
            writer = csv.DictWriter(file, _FIELDS, restval="")
            if new:
                writer.writeheader()
            writer.writerow(row)

    def save(self) -> None:
        """Write the state, whole or not at all."""
        state = {
            "run": repr(describe(self.run)),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rate": self.rate.state,
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
        }
        draft = self.state_path.with_suffix(".part")
        torch.save(state, draft)
        os.replace(draft, self.state_path)

    def _load(self) -> None:
        state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        if state["run"] != repr(describe(self.run)):
            raise ValueError(
                f"{self.out} holds another run: wanted {describe(self.run)!r}, got {state['run']}; "
                "choose another directory"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rate.state = state["rate"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss_sum = state["loss_sum"]
        if self.log_path.exists():  # rows written after that state was saved are made again
            with self.log_path.open(newline="") as file:
                rows = [r for r in csv.DictReader(file) if int(r["step"]) <= self.step]
            with self.log_path.open("w", newline="") as file:
                writer = csv.DictWriter(file, _FIELDS)
                writer.writeheader()
                writer.writerows(rows)


def describe(run: Run) -> dict[str, Any]:
    """What makes a run this run, in JSON types."""
    return {
        "config": run.config.to_json(),
        "split": dataclasses.asdict(get_split(run.split)),
        "recipe": dataclasses.asdict(get_recipe(run.recipe)),
        "steps": run.steps,
        "seed": run.seed,
        "bf16": run.bf16,
        "length_parts": run.length_parts,
    }


def train(
    run: Run,
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    compile_model: bool = False,
    save_every: int = 500,
    stop_at: int | None = None,
    progress: bool = True,
) -> QKVNormTransformer:
    """Train, or go on with the run that a directory holds; gives back the model, in eval mode.

    The directory gets ``log.csv`` (loss, learning rate, accuracy) and ``state.pt``, from which a
    killed run goes on, with the same result as one that was not killed. Under ``accelerate launch``
    the processes share the work.

    Args:
        run: what to train.
        out: the directory.
        device: ``"cpu"``, ``"cuda"``, ..; under accelerate its choice is taken.
        compile_model: use ``torch.compile``.
        save_every: steps between states on disk.
        stop_at: stop early at this step, as a kill would, but with the state saved.
        progress: show a progress bar.

    Raises:
        ValueError: the directory holds another run.
    """
    trainer = Trainer(run, Path(out), device=device, compile_model=compile_model)
    main = trainer.accelerator.is_main_process
    last = run.steps if stop_at is None else min(stop_at, run.steps)
    bar = tqdm(total=run.steps, initial=trainer.step, unit="step", disable=not (progress and main))
    began = time.monotonic() - trainer.seconds
    with bar:
        while trainer.step < last:
            trainer.one_step()
            bar.update()
            trainer.seconds = time.monotonic() - began
            if not main:
                continue
            if trainer.step % run.log_every == 0 or trainer.step == run.steps:
                bar.set_postfix(loss=f"{trainer.loss_sum / run.log_every:.3f}")
                trainer.write_log()
            if trainer.step % save_every == 0 or trainer.step == last:
                trainer.save()
    return trainer.model.eval()
