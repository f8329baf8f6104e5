"""What a reader must know about a model to read a report's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks.model import dtype_of_passes, fingerprint, input_device, versions, was_compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hooks.model import HookedModel, Prompts
    from hooks.sites.types import AttentionSites, LayerSites


def model_facts(
    model: HookedModel, prompts: Prompts, name: str | None, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Name, architecture, weights, dtype, device, versions, and what the model was given.

    ``fingerprint`` is that of the weights; ``state`` has the rest of :func:`fingerprint`.
    """
    cfg, state = model.cfg, fingerprint(model)
    given = given_facts(prompts, state) + [note.rstrip(".") for note in notes]
    return {
        "name": _own_name(model) if name is None else name,
        "architecture": str(
            getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", None) or ""
        ),
        "fingerprint": state.pop("weights"),
        "state": state,
        "given": given,
        "dtype": dtype_of_passes(model),
        "device": str(input_device(model)),
        "versions": versions(),
    }


def attention_facts(
    model: HookedModel,
    sites: AttentionSites,
    chosen: tuple[LayerSites, ...],
    prompts: Prompts,
    name: str | None,
) -> dict[str, Any]:
    """:func:`model_facts`, and a description of the layers."""
    shields = sites.to_frame().groupby("vector", sort=False)["shield"].unique()
    return model_facts(model, prompts, name, sites.notes) | {
        "labels": [s.label for s in chosen],
        "heads": [s.n_heads for s in chosen],
        "kv_heads": [s.n_kv_heads for s in chosen],
        "sites": sites.describe(),
        "shields": {role: [str(s) for s in values] for role, values in shields.items()},
    }


def _own_name(model: HookedModel) -> str:
    """The model's name without its local path, as reports are passed on.

    A bridge made of a module is called "external" unless it was named: its configuration may know
    where it came from, and its class says at least what it is.
    """
    inner = getattr(model, "original_model", None)
    names = (
        getattr(model.cfg, "model_name", None),
        getattr(getattr(inner, "config", None), "name_or_path", None),
        type(model if inner is None else inner).__name__,
    )
    name = str(next(n for n in names if n and n != "external"))
    return Path(name).name if Path(name).is_absolute() else name


def given_facts(prompts: Prompts, state: dict[str, Any]) -> list[str]:
    """In a few words each: what a reader of the numbers would not expect of the pass."""
    said = list(prompts.notes)
    if any(prompts.padding):
        said.append("padding is cut off, and positions count from each prompt's first real token")
    if prompts.extra:
        said.append(f"beside the tokens, as given: {', '.join(prompts.extra)}")
    if prompts.plain:
        said.append(", ".join(f"{name}={value!r}" for name, value in prompts.plain.items()))
    if prompts.packed:
        said.append(
            "prompts hold packed documents (their positions start again), and the first token of "
            "each counts as a first token"
        )
    if was_compiled():
        said.append("without torch.compile: our hooks would have it compile each pass anew")
    if state["autocast"]:
        said.append(f"under autocast ({state['autocast']})")
    if state["hooks"]:
        places = sorted({line.partition(":")[0] for line in state["hooks"]})
        more = f" and {len(places) - 3} others" if len(places) > 3 else ""
        said.append(f"with hooks on {', '.join(places[:3])}{more}")
    return said
