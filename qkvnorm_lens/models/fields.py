"""What the fields of TransformerLens's configuration may hold."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral
from types import NoneType
from typing import Any, Final

import numpy as np
import torch
from transformer_lens.config import TransformerBridgeConfig

from hooks.arguments import (
    brief,
    check_booleans,
    check_device,
    check_integers,
    check_kind,
    check_number,
    check_text,
    near,
    plain,
)

ACTIVATIONS: Final = ("relu", "gelu", "gelu_new", "silu")
POSITIONS: Final = ("standard", "sinusoidal", "rotary", "none")

# What TransformerLens's own configuration lets one say and this architecture does (`device`,
# `dtype`, names and tokenizer fields apart). Every other field must keep its default: accepting a
# field and ignoring it would be a wrong model without a word.
HONOURED: Final = frozenset([
    "d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab", "d_vocab_out", "d_mlp",
    "n_key_value_heads", "attn_only", "act_fn", "eps", "normalization_type", "attention_dir",
    "window_size", "positional_embedding_type", "rotary_base", "rotary_dim",
    "rotary_adjacent_pairs", "attn_implementation", "seed", "initializer_range", "init_weights",
    "dtype", "device", "model_name", "default_prepend_bos", "tokenizer_prepends_bos",
    "tokenizer_appends_eos", "default_padding_side", "tokenizer_name",
])  # fmt: skip

_OURS: Final = (
    "placement", "norm", "score_scale", "calibrated", "attn_bias", "centred", "skip", "output_mlp",
    "sinusoids",
)  # fmt: skip


def one_of(name: str, value: object, valid: Sequence[object]) -> None:
    """Refuse a value that is not one of these."""
    if not isinstance(value, (str, NoneType)) or value not in valid:
        got = f"{brief(value)}{near(value, valid)}"
        raise ValueError(f"{name}: wanted one of {list(valid)}; got {got}")


def tl_defaults() -> dict[str, Any]:
    """Every field of TransformerLens's configuration, with its default."""
    defaults: dict[str, Any] = {}
    for cls in reversed(TransformerBridgeConfig.__mro__[:-1]):
        for name, p in inspect.signature(cls).parameters.items():
            if p.kind is not p.VAR_KEYWORD:
                defaults[name] = None if p.default is p.empty else p.default
    return defaults


MOST: Final = 1 << 31

_CHOICES: Final[dict[str, tuple[str | None, ...]]] = {
    "act_fn": ACTIVATIONS,
    "normalization_type": ("LN", "RMS", None),
    "positional_embedding_type": POSITIONS,
    "attention_dir": ("causal", "bidirectional"),
    "attn_implementation": ("eager", "sdpa"),
}

_INTEGERS: Final = {
    **dict.fromkeys(("d_model", "d_head", "n_layers", "n_ctx", "d_mlp", "n_key_value_heads"), 1),
    **dict.fromkeys(("n_heads", "d_vocab", "window_size", "rotary_dim"), 1),
    "d_vocab_out": -1,
}

_BOOLEANS: Final = frozenset([
    "attn_only", "init_weights", "default_prepend_bos", "rotary_adjacent_pairs",
    "tokenizer_prepends_bos", "tokenizer_appends_eos",
])  # fmt: skip

_TEXTS: Final = frozenset(["model_name", "tokenizer_name", "default_padding_side"])


def check_fields(fields: dict[str, Any]) -> None:
    """TransformerLens's own fields as Python's numbers, before it derives the others from them.

    Raises:
        TypeError, ValueError: a field of another kind.
    """
    defaults = tl_defaults()
    if fields.get("d_model") is None:
        raise ValueError("d_model: wanted an integer >= 1; got None")
    for name, known in _CHOICES.items():
        if name in fields and not (name == "attn_implementation" and fields[name] is None):
            one_of(name, fields[name], known)
    for name, value in fields.items():
        if value is None and (defaults[name] is None or name == "tokenizer_prepends_bos"):
            continue
        if name in _INTEGERS:
            number = plain(value)
            if not (type(number) is int and number == defaults[name] == -1):  # not said
                (fields[name],) = check_integers(**{name: (value, _INTEGERS[name], MOST)})
        elif name == "seed":
            (fields[name],) = check_integers(seed=(value, 0))
        elif name in _BOOLEANS:
            (fields[name],) = check_booleans(**{name: value})
        elif name in _TEXTS:
            fields[name] = check_text(name, value)
        elif name in ("eps", "rotary_base"):
            number = check_number(name, value, "a number > 0", lambda x: 0 < x < np.inf)
            fields[name] = int(number) if isinstance(plain(value), Integral) else number
        elif name == "initializer_range":
            fields[name] = check_number(name, value, "a finite number", np.isfinite)
        elif name == "device":
            fields[name] = check_device(name, value)
        elif name == "dtype":
            check_kind(name, value, torch.dtype, "a dtype of torch")


def _same(value: Any, default: Any) -> bool:
    """Whether two values are equal, of any kind; an array equals nothing."""
    try:
        return bool(value == default)
    except (ValueError, RuntimeError, TypeError):
        return False


def refuse_unknown(fields: dict[str, Any]) -> None:
    """Refuse fields that these models don't follow, unless they have TransformerLens's default."""
    defaults = tl_defaults()
    for name, value in fields.items():
        if name not in defaults:
            known = sorted({*HONOURED, *_OURS})
            raise ValueError(
                f"{name}: wanted one of the fields {sorted(HONOURED)}; got no such field"
                f"{near(name, known)}"
            )
        if name not in HONOURED and name != "architecture" and not _same(value, defaults[name]):
            raise ValueError(
                f"{name}: wanted the default "
                f"{defaults[name]!r}, as this architecture has no such feature; got {brief(value)}"
            )
