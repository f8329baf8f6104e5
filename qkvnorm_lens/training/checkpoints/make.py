"""Make a shipped model, with one command.

    python -m qkvnorm_lens.training.checkpoints.make addition-pre --out runs/addition-pre

Trains (or resumes the run that the directory holds), measures, and writes weights,
configuration, tokenizer, card and log in the form that `load_checkpoint` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from qkvnorm_lens.models import QKVNormTransformer, named_config, write_card
from qkvnorm_lens.training import (
    TEST_SEED,
    Run,
    Split,
    Texts,
    build_tokenizer,
    describe,
    evaluate,
    get_split,
    get_task,
    ngram_loss,
    processes,
    score,
    sequences,
    train,
)
from qkvnorm_lens.training.texts import held_out_tokens, text_tokenizer, train_tokens

RUNS: Final[dict[str, Run]] = {
    f"addition-{placement}": Run(
        named_config("small", placement), "small-train", "modern", steps=10_000, seed=0, bf16=True
    )
    for placement in ("none", "pre", "qkv")
}
TESTS: Final = {
    "in distribution": "small-train",
    "interpolation": "small-interpolation",
    "extrapolation": "small-extrapolation",
}

MODULE = "qkvnorm_lens.training.checkpoints.make"


def tests(run: Run) -> dict[str, str | Split]:
    """The kinds of sums for which a model's card gives its accuracy."""
    assert not isinstance(run.split, Texts)
    if get_split(run.split) == get_split(TESTS["in distribution"]):
        return dict(TESTS)
    return {"in distribution": run.split}


def card(
    name: str, run: Run, model: QKVNormTransformer, command: str, *, rows: int = 20_000
) -> dict[str, Any]:
    """How a model was made, and its accuracy on sums, or text, that training has not seen."""
    return {
        "name": name,
        "command": command,
        "run": describe(run),
        "sequences": sequences(run),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": accuracy(run, model, rows),
        "versions": {name: version(name) for name in ("torch", "transformer-lens")},
    }


def accuracy(run: Run, model: QKVNormTransformer, rows: int) -> dict[str, Any]:
    """By test: sums drawn separately from training; or held-out books, with what n-grams lose."""
    if isinstance(task := get_task(run.split), Texts):
        read, held = train_tokens(task.path), held_out_tokens()
        grams = {f"{n}-gram": ngram_loss(n, read, held) for n in (1, 2, 3)}
        return {"held out": {**dataclasses.asdict(score(model, task.length)), **grams}}
    return {
        kind: {
            "split": get_split(split).to_json(),
            "seed": TEST_SEED,
            **dataclasses.asdict(evaluate(model, split, rows=rows)),
        }
        for kind, split in tests(run).items()
    }


def install(
    name: str,
    run: Run,
    model: QKVNormTransformer,
    log: Path,
    folder: Path,
    *,
    command: str,
    rounded: bool = False,
) -> dict[str, Any]:
    """Write a trained model with its card and log into a folder; returns the card.

    Args:
        name: of the model.
        run: that made it.
        model: as trained.
        log: of the training.
        folder: where to write it.
        command: that makes it again.
        rounded: round the weights to bfloat16, which is then what the card is about.
    """
    model.tokenizer = text_tokenizer() if isinstance(run.split, Texts) else build_tokenizer()
    if rounded:
        model.to(torch.bfloat16).to(model.cfg.dtype)
    model.write(folder, torch.bfloat16 if rounded else model.cfg.dtype)
    shutil.copyfile(log, folder / "log.csv")
    made = card(name, run, model, command)
    write_card(made, folder / "card.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write one shipped model."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("name", choices=sorted(RUNS))
    parser.add_argument("--out", type=Path, required=True, help="state and log of the run")
    parser.add_argument("--folder", type=Path, help="where to write it (default: in the package)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    started = processes(options.device)
    if started > 1:  # each would have a batch of its own
        parser.error(f"wanted one process; got {started}")
    torch.set_num_threads(options.threads)
    run = RUNS[options.name]
    model = train(run, options.out, device=options.device).cpu()
    folder = options.folder or Path(__file__).parent / options.name
    command = (
        f"python -m qkvnorm_lens.training.checkpoints.make {options.name} --out runs/{options.name}"
    )
    install(options.name, run, model, options.out / "log.csv", folder, command=command)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
