"""``qkvnorm-lens train``: train a model on addition, or resume a stopped run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qkvnorm_lens.arguments import (
    brief,
    check_name,
    count,
    directory,
    near,
    number,
    positive,
    some_path,
)

if TYPE_CHECKING:
    from qkvnorm_lens.models import QKVNormConfig, QKVNormTransformer
    from qkvnorm_lens.training import Recipe, Run

HELP = "train a model on addition"
DESCRIPTION = """\
Train a model with No-Norm, Pre-Norm or QKV-Norm attention on sums such as [12+34-N5=51], and
measure it. The same command resumes a stopped run, and ends with the same weights as an
uninterrupted one. DIR gets state.pt, run.json, log.csv, and DIR/model (the model and its card)."""
EPILOG = """\
examples:
  qkvnorm-lens train --config study --placement pre --out runs/study-pre
  qkvnorm-lens train --config small --placement qkv --bf16 --threads 1 --out runs/small-qkv
  qkvnorm-lens train --config baseline --placement pre --device cuda --bf16 --out runs/baseline-pre
  accelerate launch -m qkvnorm_lens train --config large --device cuda --out runs/large
"""


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a named configuration is trained on, and how, by default."""

    split: str
    recipe: str
    steps: int


PAPER_STEPS: Final = 110_000_000 // 128  # Menary et al. 2024, appendix on training
DEFAULTS: Final = {
    "small": Defaults("small-train", "modern", 10_000),
    "study": Defaults("small-train", "study", 16_000),
    "baseline": Defaults("paper-train", "paper", PAPER_STEPS),
    "alternate": Defaults("paper-train", "paper", PAPER_STEPS),
    "large": Defaults("large-train", "paper", PAPER_STEPS),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--out", type=some_path, metavar="DIR", required=True, help="the run's directory"
    )
    _model(parser.add_argument_group("model"))
    _training(parser.add_argument_group("training"))
    where = parser.add_argument_group("how it runs")
    where.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... [cpu]")
    where.add_argument(
        "--bf16", action="store_true", help="matrix products in bfloat16, weights in float32"
    )
    where.add_argument("--compile", action="store_true", help="use torch.compile")
    where.add_argument("--threads", type=positive, metavar="N", help="CPU threads [torch's choice]")
    where.add_argument(
        "--save-every", type=positive, default=500, metavar="N", help="steps between states [500]"
    )
    said = "sums to measure accuracy on for the log, every 1000 steps and at the last [4000]"
    where.add_argument("--eval-rows", type=positive, default=4000, metavar="N", help=said)
    said = "sums of each kind to measure accuracy on at the end [20000]"
    where.add_argument("--test-rows", type=positive, default=20_000, metavar="N", help=said)


def _model(group: argparse._ArgumentGroup) -> None:
    said = f"{', '.join(DEFAULTS)}, or a file as save_pretrained writes config.json [study]"
    group.add_argument("--config", default="study", metavar="NAME|FILE.json", help=said)
    said = "where the attention's norm is [pre; a file's own]"
    group.add_argument("--placement", choices=("none", "pre", "qkv"), help=said)


def _training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--split", metavar="NAME", help="which sums [the configuration's]")
    said = (
        "paper, modern (Muon, cosine), study (modern at 0.01) or modern-adamw [the "
        "configuration's; a file: modern]"
    )
    group.add_argument("--recipe", metavar="NAME", help=said)
    group.add_argument("--steps", type=positive, metavar="N", help="[the configuration's]")
    group.add_argument(
        "--lr",
        type=number("a number > 0", lambda x: 0 < x < math.inf),
        metavar="RATE",
        help="highest learning rate [the recipe's]",
    )
    group.add_argument(
        "--batch-size", type=positive, metavar="N", help="sums a step [the recipe's]"
    )
    group.add_argument(
        "--seed", type=count, metavar="N", help="of weights and data [the configuration's, and 0]"
    )


def run(args: argparse.Namespace) -> str:
    """Train, measure, write; returns the table of accuracies."""
    directory("--out", args.out)
    wanted = plan(args)
    check_device(args.device)
    import torch

    from qkvnorm_lens.training import Stopped, processes, train

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    shared_by = processes(args.device)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that share the work
    _claim(args.out, wanted, shared_by, write=first)
    try:
        model = train(
            wanted,
            args.out,
            device=args.device,
            compile_model=args.compile,
            save_every=args.save_every,
        )
    except Stopped as stop:
        raise Stopped(f"{stop}; the same command goes on from there", stop.signal) from stop
    if not first:
        return ""
    try:
        made = finish(args, wanted, model, shared_by)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the model could not be written: {error.strerror or error}; {args.out / 'state.pt'} "
            "holds the last step, whole: make room, and the same command writes the model",
        ) from error
    return report(made, args.out / "model")


def plan(args: argparse.Namespace) -> Run:
    """The run that the options ask for.

    Raises:
        ValueError: incompatible options, or unknown names.
    """
    from qkvnorm_lens.training import Run

    config = _config(args)
    default = DEFAULTS.get(args.config)
    split = args.split or (default.split if default else None)
    if split is None:
        raise ValueError(
            f"--split: wanted one of {_splits()} with a configuration from a file; got none"
        )
    check_name("--split", split, _splits())
    return Run(
        config,
        split,
        _recipe(args, default.recipe if default else "modern"),
        steps=args.steps or (default.steps if default else 10_000),
        seed=args.seed or 0,
        bf16=args.bf16,
        length_parts=min(2, args.batch_size or 2),
        eval_rows=args.eval_rows,
    )


def _config(args: argparse.Namespace) -> QKVNormConfig:
    from qkvnorm_lens.models import QKVNormConfig, named_config

    seed = {} if args.seed is None else {"seed": args.seed}
    if args.config in DEFAULTS:
        return named_config(args.config, args.placement or "pre", **seed)
    path = Path(args.config)
    if path.suffix != ".json":
        raise ValueError(
            f"--config: wanted one of {sorted(DEFAULTS)} or a file that ends in .json; got "
            f"{brief(args.config)}{near(args.config, DEFAULTS)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        got = f"{brief(str(path))}: {error.strerror}"
        raise ValueError(f"--config: wanted a file that can be read; got {got}") from error
    except ValueError as error:
        raise ValueError(f"--config: wanted JSON; got {brief(str(path))}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: wanted an object in {path}; got a {type(values).__name__}")
    if args.placement not in (None, values.get("placement")):
        values |= {"placement": args.placement, "norm": None}  # None: the paper's norm
    try:
        return QKVNormConfig.from_json({**values, **seed})
    except (ValueError, TypeError) as error:
        raise ValueError(f"--config: {path}: {error}") from error


def _splits() -> list[str]:
    from qkvnorm_lens.training import SPLITS

    return sorted(SPLITS)


def _recipe(args: argparse.Namespace, default: str) -> Recipe:
    from qkvnorm_lens.training import RECIPES, get_recipe

    name = args.recipe or default
    check_name("--recipe", name, sorted(RECIPES))
    asked = {"lr": args.lr, "batch_size": args.batch_size}
    changes = {key: value for key, value in asked.items() if value is not None}
    return dataclasses.replace(get_recipe(name), **changes)


def check_device(device: str) -> None:
    """Refuse a device that PyTorch can't use, before anything is loaded."""
    import torch

    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        got = f"{brief(device)}: {reason}"
        raise ValueError(f"--device: wanted one that PyTorch can use; got {got}") from error


def _claim(out: Path, wanted: Run, processes: int, *, write: bool) -> None:
    """Note in the directory which run it holds.

    Raises:
        ValueError: it holds another one; the message says in what they differ.
    """
    from hooks.reports import write_whole
    from qkvnorm_lens.training import describe

    run = json.loads(json.dumps(describe(wanted, processes)))
    note = out / "run.json"
    if note.exists():
        differ = _differences(run, _noted(note))
        if differ:
            raise ValueError(
                f"{out} holds another run: wanted {'; '.join(differ)}; choose another --out (or, "
                f"if {note.name} was damaged, delete it: the state says too which run it is of)"
            )
    elif write:
        out.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: other processes read it.
        write_whole(note, f"{json.dumps(run, indent=2)}\n".encode())


def _noted(note: Path) -> dict[str, Any]:
    """Which run a directory holds.

    Raises:
        RunFileError: its note can't be read.
    """
    from hooks.reports import Unsound, read_json
    from qkvnorm_lens.training import RunFileError

    try:
        held = read_json(note.read_bytes(), "run")
    except Unsound as error:
        got = error.got
    else:
        if isinstance(held, dict):
            return held
        got = type(held).__name__
    how = "delete it and start the same run again: the state says too which run it is of"
    raise RunFileError(note, f"wanted a JSON object; got {got}; {how}")


def _differences(wanted: dict[str, Any], got: dict[str, Any], at: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted({*wanted, *got}):
        a, b = wanted.get(key), got.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{at}{key}.")
        elif a != b:
            found.append(f"{at}{key} = {a!r}, got {b!r}")
    return found


def finish(
    args: argparse.Namespace, run: Run, model: QKVNormTransformer, processes: int
) -> dict[str, Any]:
    """Measure a trained model, and write it with its card and log; returns the card."""
    from qkvnorm_lens.models import save_pretrained, write_card
    from qkvnorm_lens.training import (
        TEST_SEED,
        build_tokenizer,
        describe,
        evaluate,
        get_split,
        sequences,
        tests_of,
    )

    assert isinstance(run.split, str)
    device = next(model.parameters()).device
    card = {
        "name": args.out.name,
        "run": describe(run, processes),
        "sequences": sequences(run, processes),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": {
            kind: {
                "split": get_split(split).to_json(),
                "seed": TEST_SEED,
                **dataclasses.asdict(evaluate(model, split, rows=args.test_rows, device=device)),
            }
            for kind, split in tests_of(run.split, run.config.n_ctx).items()
        },
        "device": str(device),
        "versions": {name: version(name) for name in ("torch", "transformer-lens")},
    }
    folder = args.out / "model"
    model.tokenizer = build_tokenizer()
    save_pretrained(model, folder)
    shutil.copyfile(args.out / "log.csv", folder / "log.csv")
    write_card(card, folder / "card.json")
    return card


def report(card: dict[str, Any], folder: Path) -> str:
    """The accuracies of a card as a table, and where the model is."""
    from qkvnorm_lens.tables import table

    keys = ("per_token", "per_token_without_end", "exact", "exact_without_end")
    rows = [
        [kind, *(f"{100 * measured[key]:.2f}%" for key in keys), f"{measured['rows']:,}"]
        for kind, measured in card["accuracy"].items()
    ]
    head = ["accuracy", "per token", "without ]", "exact", "without ]", "sums"]
    return (
        f"{table(head, rows)}\n\n"
        f"{card['sequences']:,} sums, {card['parameters']:,} parameters. Written to {folder}"
    )
