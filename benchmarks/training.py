"""Sequences per second in training: our loop against TransformerLens's `tools.training.train`.

    python benchmarks/training.py [--steps 40] [--repeats 5] [--clock cpu] [--json FILE]

The small configuration on its own sums, side by side in one process, turn and turn about: the same
start, the same rows, the same AdamW, float32. Each is timed as a user calls it, all costs included
(ours draws its rows on the fly, logs every step, measures accuracy once and saves its state; theirs
is given rows already drawn, with `]`, padded to one length, and learns to predict every token of
them, for it has no masked loss). "as shipped" is our loop with Muon and bfloat16, as the shipped
models were made. Fails if a loss is not what the other side computes, if a loss does not fall, or
if ours is less than 1.5 times as fast.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformer_lens.tools.training import TrainConfig, train as train_theirs

from qkvnorm_lens.models import QKVNormTransformer, named_config, to_bridge, to_plain
from qkvnorm_lens.training import END, PAD, RECIPES, Batch, Recipe, Run, draw, train

SPLIT, BATCH, WANTED = "small-train", 128, 1.5
SAME = Recipe("adamw", lr=1e-3, schedule="plateau", batch_size=BATCH, decay_all=True, clip=1.0)
SHIPPED = dataclasses.replace(RECIPES["modern"], warmup=5)  # so that a short run gets anywhere
CONFIG = named_config("small", "pre")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DATA_STREAM = 1  # the rows of step s of a run are drawn from (seed, 1, process, s)


def whole(batch: Batch, length: int) -> torch.Tensor:
    """The rows with their `]`, which a decoder's input lacks."""
    rows = F.pad(batch.tokens, (0, length - batch.tokens.shape[1]), value=PAD)
    row, pos = (batch.targets == END).nonzero(as_tuple=True)
    rows[row, pos + 1] = END
    return rows


class Rows(Dataset):  # type: ignore[type-arg]
    """What `train` reads; remembers in which order it did."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.order = rows, list[int]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.order.append(i)
        return {"tokens": self.rows[i]}


def theirs(rows: torch.Tensor, clock: str) -> tuple[float, list[float], QKVNormTransformer]:
    """Seconds, losses, trained model; the first loss is checked against our plain module's."""
    model, dataset = to_bridge(QKVNormTransformer(CONFIG)), Rows(rows)
    config = TrainConfig(
        num_epochs=1,
        batch_size=BATCH,
        lr=SAME.lr,
        weight_decay=SAME.weight_decay,
        max_grad_norm=SAME.clip,
        optimizer_name="AdamW",
        device="cpu",
        print_every=1,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        began = CLOCKS[clock]()
        train_theirs(model, config, dataset)
        seconds = CLOCKS[clock]() - began
    losses = [float(x) for x in re.findall(r"Loss (\S+)", printed.getvalue())]
    first = rows[dataset.order[:BATCH]]
    with torch.no_grad():
        logits = QKVNormTransformer(CONFIG)(first)[:, :-1]
    expect(losses[0], float(F.cross_entropy(logits.flatten(0, 1), first[:, 1:].flatten())), 1e-4)
    return seconds, losses, to_plain(model)


def ours(run: Run, tolerance: float, clock: str) -> tuple[float, list[float], QKVNormTransformer]:
    """Seconds, losses, trained model; the first loss is checked against TransformerLens's."""
    with tempfile.TemporaryDirectory() as folder:
        began = CLOCKS[clock]()
        model = train(run, folder, progress=False)
        seconds = CLOCKS[clock]() - began
        with (Path(folder) / "log.csv").open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
    first = draw(SPLIT, BATCH, seed=(run.seed, DATA_STREAM, 0, 0))
    rows = whole(first, first.tokens.shape[1] + 1)
    with torch.no_grad():
        each = to_bridge(QKVNormTransformer(CONFIG))(rows, return_type="loss", loss_per_token=True)
    expect(losses[0], float(each[first.scored].mean()), tolerance)
    return seconds, losses, model


def expect(got: float, wanted: float, tolerance: float) -> None:
    if not abs(got - wanted) <= tolerance * abs(wanted):
        raise SystemExit(f"first loss: wanted {wanted:.6f}, got {got:.6f}")


@torch.no_grad()
def answer_loss(model: QKVNormTransformer, batch: Batch) -> float:
    """The masked loss, the same measure for all."""
    at = batch.scored
    return float(F.cross_entropy(model(batch.tokens)[at], batch.targets[at]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: on a machine that is busy"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock, steps, fresh = options.clock, options.steps, draw(SPLIT, 1000, seed=99)
    start = answer_loss(QKVNormTransformer(CONFIG).eval(), fresh)
    drawn = [draw(SPLIT, BATCH, seed=(0, DATA_STREAM, 0, step)) for step in range(steps)]
    length = max(batch.tokens.shape[1] for batch in drawn) + 1
    rows = torch.cat([whole(batch, length) for batch in drawn])
    logged = {"steps": steps, "log_every": 1, "eval_every": steps, "eval_rows": BATCH}
    runs = {
        "ours": (Run(CONFIG, SPLIT, SAME, **logged), 1e-4),
        "ours, as shipped": (Run(CONFIG, SPLIT, SHIPPED, bf16=True, **logged), 2e-2),
    }
    rates: dict[str, list[float]] = {"TransformerLens": [], **{name: [] for name in runs}}
    ends: dict[str, float] = {}
    for repeat in range(options.repeats + 1):  # the first is to warm up
        for name in rates:
            seconds, losses, model = (
                theirs(rows, clock) if name not in runs else ours(*runs[name], clock)
            )
            ends[name] = answer_loss(model.eval(), fresh)
            fell = losses[-1] < losses[0] - 0.1 and ends[name] < start - 0.1
            if len(losses) != steps or not fell:
                raise SystemExit(f"{name}: wanted a falling loss, got {losses}, {ends[name]}")
            if repeat:
                rates[name].append(steps * BATCH / seconds)
    base = rates["TransformerLens"]
    table = [
        {
            "loop": name,
            "sequences/s": round(statistics.median(rate), 1),
            "least": round(min(rate), 1),
            "most": round(max(rate), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(rate, base, strict=True)), 2),
            "answer loss": round(ends[name], 3),
        }
        for name, rate in rates.items()
    ]
    print(
        f"small configuration, {BATCH} rows a step, {steps} steps, {options.repeats} repeats, "
        f"{options.threads} thread(s), {clock} clock; torch {torch.__version__}; "
        f"answer loss at the start {start:.3f}\n"
        "medians; ratio: median over repeats of each loop's rate to TransformerLens's"
    )
    lines = [list(table[0]), *(list(map(str, row.values())) for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)))
    if options.json:
        options.json.write_text(
            json.dumps(
                {**vars(options), "json": None, "start": start, "rates": rates, "table": table},
                indent=2,
            )
        )
    if table[1]["ratio"] < WANTED:
        raise SystemExit(f"wanted at least {WANTED} times TransformerLens, got {table[1]['ratio']}")


if __name__ == "__main__":
    main()
