"""Transformers with No-Norm, Pre-Norm and QKV-Norm attention, and what norm noise does to models.

Importing this package imports neither torch nor TransformerLens: each name below is fetched from
its module when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkvnorm_lens.adapter import from_pretrained, save_pretrained, to_bridge, to_plain
    from qkvnorm_lens.checkpoints import checkpoint_card, load_checkpoint
    from qkvnorm_lens.config import NormSpec, QKVNormConfig, Sinusoids, named_config
    from qkvnorm_lens.loading import load_model
    from qkvnorm_lens.model import QKVNormTransformer
    from qkvnorm_lens.plots import collapse_curve, head_map, training_curves

__version__ = "0.1.0"

_HOME = {
    "QKVNormConfig": "config",
    "NormSpec": "config",
    "Sinusoids": "config",
    "named_config": "config",
    "QKVNormTransformer": "model",
    "to_bridge": "adapter",
    "to_plain": "adapter",
    "save_pretrained": "adapter",
    "from_pretrained": "adapter",
    "load_checkpoint": "checkpoints",
    "checkpoint_card": "checkpoints",
    "load_model": "loading",
    "collapse_curve": "plots",
    "head_map": "plots",
    "training_curves": "plots",
}

__all__ = [
    "QKVNormConfig",
    "NormSpec",
    "Sinusoids",
    "named_config",
    "QKVNormTransformer",
    "to_bridge",
    "to_plain",
    "save_pretrained",
    "from_pretrained",
    "load_checkpoint",
    "checkpoint_card",
    "load_model",
    "collapse_curve",
    "head_map",
    "training_curves",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module (PEP 562)."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
