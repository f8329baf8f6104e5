"""Small trained models that come with the package.

Each is a directory with ``model.safetensors``, ``config.json``, the tokenizer, ``card.json``
(configuration, seed, command, data, accuracy) and ``log.csv`` (its training curve).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qkvnorm_lens.arguments import check_name

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

DEFAULT = "addition-pre"
EXPERIMENT_MODELS: Final = Path(__file__).parents[1] / "experiments" / "models"
MAKE: Final = "python -m qkvnorm_lens.experiments.train"
SHIPPED: Final = Path(__file__).parents[1] / "training" / "checkpoints"


def checkpoints() -> list[str]:
    """The names of the shipped models."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/model.safetensors"))


def experiment_models(folder: Path = EXPERIMENT_MODELS) -> dict[str, Path]:
    """Directories of the models that the experiments compare, by name: ``study-pre-1``, ..."""
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/card.json"))}


def is_experiment_model(name: str) -> bool:
    """Whether a name is one that a model of the experiments has, here or not."""
    kinds = "study|addition|confound|centred|order|language"
    return re.fullmatch(rf"({kinds})-[a-z-]+-\d+", name) is not None


def how_to_get(name: str = "") -> str:
    """Where the experiments' models, or one of them, come from: the wheel has none."""
    command = f"{MAKE} {name}".strip()
    return f"they do not come with the wheel: `{command}` makes them, a clone has them"


def checkpoint_path(name: str = DEFAULT) -> Path:
    """The directory of a shipped model.

    Raises:
        ValueError: no such model; the message lists the models.
    """
    return SHIPPED / check_name("name", name, checkpoints())


def checkpoint_card(name: str = DEFAULT) -> dict[str, Any]:
    """How a shipped model was made, and its accuracy.

    Raises:
        ValueError: no such model.
    """
    card: dict[str, Any] = json.loads((checkpoint_path(name) / "card.json").read_text())
    return card


def load_checkpoint(
    name: str = DEFAULT,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> TransformerBridge:
    """A shipped model as a ``TransformerBridge`` with its tokenizer, in eval mode; offline.

    Args:
        name: one of `checkpoints`.
        device: where to put it.
        dtype: a dtype other than the saved one.
        attn_implementation: ``"eager"`` or ``"sdpa"``, if not as saved.

    Raises:
        ValueError: no such model.
    """
    from qkvnorm_lens.models.bridge import from_pretrained

    bridge = from_pretrained(
        checkpoint_path(name), device=device, dtype=dtype, attn_implementation=attn_implementation
    )
    bridge.cfg.model_name = name  # reports name the model by it
    return bridge
