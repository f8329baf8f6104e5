"""What a reader must know of a model to read a report's numbers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks import _state
from hooks._inputs import input_device

if TYPE_CHECKING:
    from hooks.sites import AttentionSites, HookedModel, LayerSites


def model_facts(model: HookedModel) -> dict[str, Any]:
    """Name, architecture, weights, dtype, device, versions."""
    cfg = model.cfg
    return {
        "name": _name(str(getattr(cfg, "model_name", None) or type(model).__name__)),
        "architecture": str(
            getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None) or ""
        ),
        "fingerprint": _state.fingerprint(model),
        "dtype": _state.dtype_of_passes(model),
        "device": str(input_device(model)),
        "versions": {
            name: version(name) for name in ("transformer-lens", "torch", "transformers", "numpy")
        },
    }


def attention_facts(
    model: HookedModel, sites: AttentionSites, chosen: tuple[LayerSites, ...]
) -> dict[str, Any]:
    """The same, and what its layers are."""
    shields = sites.to_frame().groupby("vector", sort=False)["shield"].unique()
    return model_facts(model) | {
        "labels": [s.label for s in chosen],
        "heads": [s.n_heads for s in chosen],
        "kv_heads": [s.n_kv_heads for s in chosen],
        "sites": sites.describe(),
        "shields": {role: [str(s) for s in values] for role, values in shields.items()},
    }


def _name(name: str) -> str:
    """A report is handed on: where a model lay on this machine is left out."""
    return Path(name).name if Path(name).is_absolute() else name
