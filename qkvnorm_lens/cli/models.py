"""``qkvnorm-lens models``: the models that come with the package."""

from __future__ import annotations

import argparse
import json
from textwrap import fill
from typing import Any

from qkvnorm_lens.models import (
    DEFAULT,
    checkpoint_card,
    checkpoint_path,
    checkpoints,
    experiment_models,
    how_to_get,
)
from qkvnorm_lens.tables import table

HELP = "list the shipped models"
DESCRIPTION = "List the shipped models: size, what they were trained on, and per-token accuracy."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="the cards, as JSON")


def run(args: argparse.Namespace) -> str:
    """The table, or the cards as JSON."""
    cards = {name: checkpoint_card(name) for name in checkpoints()}
    if args.json:
        return json.dumps(cards, indent=2)
    if not cards:
        return "No model is shipped with this build."
    rows = [_row(name, card) for name, card in cards.items()]
    head = ["model", "placement", "layers x heads", "parameters", "size", "trained on"]
    kinds = list(next(iter(cards.values()))["accuracy"])
    text = table([*head, *kinds], rows, left=(0, 1, 5))
    seeds: dict[str, list[str]] = {}
    for name in experiment_models():
        group, _, seed = name.rpartition("-")
        seeds.setdefault(group, []).append(seed)
    others = ", ".join(
        f"{group}-{{{','.join(sorted(each, key=int))}}}" for group, each in seeds.items()
    )
    others = fill(others, 100, break_on_hyphens=False)
    more = f"The experiments' models, one for each seed, go by their names too:\n{others}"
    if not others:
        more = f"The experiments compare other models; {how_to_get()}."
    return (
        f"{text}\n\nAccuracy per token, teacher forced. `probe` without a model takes {DEFAULT}."
        f"\n\n{more}"
    )


def _row(name: str, card: dict[str, Any]) -> list[str]:
    config, split = card["run"]["config"], card["run"]["split"]
    size = (checkpoint_path(name) / "model.safetensors").stat().st_size
    counts, digits = (", ".join(map(str, split[key])) for key in ("counts", "digits"))
    return [
        name,
        config["placement"],
        f"{config['n_layers']} x {config['n_heads']}",
        f"{card['parameters']:,}",
        f"{size / 1e6:.1f} MB",
        f"{counts} integers of {digits} digits",
        *(f"{100 * measured['per_token']:.1f}%" for measured in card["accuracy"].values()),
    ]
