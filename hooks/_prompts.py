"""Texts or token ids to unpadded prompts, and prompts to batches of one length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooks import _state
from hooks._inputs import ModelInput, has_decoder, input_device, real_spans


@dataclass(frozen=True)
class Prompts:
    """What the model is given, prompt by prompt: without padding, which is cut off and counted.

    Attributes:
        first: each prompt's token ids ``[pos]``, image or wave form.
        padding: padding positions that were cut off.
        strings: the tokens as strings; empty for images and sound.
        decoder: token ids that an encoder-decoder's decoder is given; empty for other models.
        decoder_strings: the same as strings.
        each: other inputs, a tensor for each prompt.
        joined: of a single prompt, what a model takes joined along the first axis (image patches).
        plain: what is no tensor, for all prompts.
    """

    first: tuple[Tensor, ...]
    padding: tuple[int, ...]
    strings: tuple[tuple[str, ...], ...]
    decoder: tuple[Int[Tensor, "_"], ...] = ()
    decoder_strings: tuple[tuple[str, ...], ...] = ()
    each: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    joined: Mapping[str, Tensor] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.first)

    def batches(self, batch_size: int) -> list[tuple[list[int], ModelInput]]:
        """Prompts of one shape together, at most ``batch_size``: (their indices, the input)."""
        by_shape: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, first in enumerate(self.first):
            decoder = len(self.decoder[index]) if self.decoder else 0
            by_shape[(tuple(first.shape), decoder)].append(index)
        return [
            (indices[at : at + batch_size], self.batch(indices[at : at + batch_size]))
            for indices in by_shape.values()
            for at in range(0, len(indices), batch_size)
        ]

    def batch(self, indices: Sequence[int]) -> ModelInput:
        """Prompts of one shape as a model takes them."""
        named: dict[str, Any] = {**self.plain, **self.joined}
        named |= {n: torch.stack([rows[i] for i in indices]) for n, rows in self.each.items()}
        if self.decoder:
            named["decoder_input_ids"] = torch.stack([self.decoder[i] for i in indices])
        first = torch.stack([self.first[i] for i in indices])
        return ModelInput(first, named, frozenset(self.joined))


def encode(
    model: Any,
    tokens: str | Sequence[Any] | Tensor | Mapping[str, Any],
    *,
    decoder_tokens: str | Sequence[Any] | Tensor | None = None,
    attention_mask: Int[Tensor, "*batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> Prompts:
    """Prompts from a text, texts, ids ``[pos]`` or ``[batch, pos]``, a list of ids, or inputs.

    Raises:
        ValueError: nothing to probe, an id outside the vocabulary, one token only, or more tokens
            than the context holds.
        TypeError: something that is neither text nor integer ids.
    """
    named: dict[str, Any] = {}
    decoder_mask = None
    if isinstance(tokens, Mapping):
        named = dict(tokens)
        attention_mask = _one_of_two(named, "attention_mask", "attention_mask", attention_mask)
        decoder_tokens = _one_of_two(named, "decoder_input_ids", "decoder_tokens", decoder_tokens)
        decoder_mask = named.pop("decoder_attention_mask", None)
        name = _first_name(model)
        if name not in named:
            raise ValueError(f"inputs: wanted {name!r} among them; got {sorted(named)}")
        tokens = named.pop(name)
    if isinstance(tokens, Tensor) and tokens.is_floating_point():
        return _signals(model, tokens, named)
    rows, spans = _rows(model, tokens, attention_mask, prepend_bos)
    for index, row in enumerate(rows):
        _check_ids(model, row, f"prompt {index}", least=2)
    width = int(tokens.shape[-1]) if isinstance(tokens, Tensor) else 0
    prompts = Prompts(
        first=tuple(rows),
        padding=tuple((width or end) - (end - first) for first, end in spans),
        strings=tuple(_strings(model, row) for row in rows),
        **_beside(named, spans, width),
    )
    if not has_decoder(model):
        if decoder_tokens is not None or decoder_mask is not None:
            raise ValueError(
                f"decoder_tokens: wanted an encoder-decoder model; got {type(model).__name__} "
                "without a decoder of its own"
            )
        return prompts
    decoder = _decoder_rows(model, rows, decoder_tokens, decoder_mask)
    for index, row in enumerate(decoder):
        _check_ids(model, row, f"decoder's prompt {index}", least=1)
    strings = tuple(_strings(model, row) for row in decoder)
    return replace(prompts, decoder=tuple(decoder), decoder_strings=strings)


def _one_of_two(named: dict[str, Any], name: str, argument: str, given: Any) -> Any:
    """An input that can be named or given as an argument, and not as both."""
    if name in named and given is not None:
        raise ValueError(f"{argument}: wanted it once; got it beside {name!r} of the inputs too")
    return named.pop(name, given)


def _beside(
    named: Mapping[str, Any], spans: Sequence[tuple[int, int]], width: int
) -> dict[str, Any]:
    """Other inputs prompt by prompt, those with an axis of positions cut like the tokens."""
    each: dict[str, tuple[Tensor, ...]] = {}
    joined: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            plain[name] = value
        elif value.shape[:1] == (len(spans),):
            cut = width and value.shape[1:2] == (width,) and not value.is_floating_point()
            each[name] = tuple(
                row[first:end] if cut else row
                for row, (first, end) in zip(value.cpu(), spans, strict=True)
            )
        elif len(spans) == 1:
            joined[name] = value.cpu()  # an axis of patches: prompts lie one behind the other
        else:
            raise ValueError(
                f"inputs: wanted {name!r} with an entry for each of {len(spans)} prompts, or one "
                f"prompt at a time; got shape {list(value.shape)}"
            )
    return {"each": each, "joined": joined, "plain": plain}


def _first_name(model: Any) -> str:
    if getattr(model.cfg, "is_visual_model", False):
        return "pixel_values"
    return "input_values" if getattr(model.cfg, "is_audio_model", False) else "input_ids"


def _signals(model: Any, signals: Tensor, named: Mapping[str, Any]) -> Prompts:
    """Images ``[batch, channel, height, width]``, wave forms ``[batch, time]`` or spectrograms."""
    if _first_name(model) == "input_ids":
        raise TypeError(
            f"tokens: wanted integer ids (this model reads tokens); got {signals.dtype} of shape "
            f"{list(signals.shape)}"
        )
    n_dims = (4,) if _first_name(model) == "pixel_values" else (2, 3)
    if signals.ndim not in n_dims or not signals.numel():
        raise ValueError(
            f"{_first_name(model)}: wanted {n_dims[-1]} axes, the prompts first; got shape "
            f"{list(signals.shape)}"
        )
    signals = signals.to(_state.model_dtype(model)).cpu()
    n = len(signals)
    return Prompts(tuple(signals), (0,) * n, ((),) * n, **_beside(named, [(0, 0)] * n, 0))


def _check_ids(model: Any, row: Tensor, name: str, *, least: int) -> None:
    n_ctx = int(getattr(model.cfg, "n_ctx", 0) or 0)
    vocabulary = int(model.cfg.d_vocab)
    if len(row) < least:
        why = " (with one there is nothing to compare)" if least > 1 else ""
        raise ValueError(
            f"{name}: wanted at least {least} token{'s' * (least > 1)}{why}; got {len(row)}"
        )
    if n_ctx and len(row) > n_ctx:
        raise ValueError(f"{name}: wanted at most {n_ctx} tokens (the context); got {len(row)}")
    if vocabulary > 0 and not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
        raise ValueError(
            f"{name}: wanted token ids from 0 to {vocabulary - 1}; got {int(row.min())} to "
            f"{int(row.max())}"
        )


def _decoder_rows(model: Any, rows: list[Tensor], given: Any, mask: Tensor | None) -> list[Tensor]:
    """The decoder's ids; by default the prompt itself after the start token, as in denoising."""
    inner = model.original_model
    known = (inner.config, getattr(inner, "generation_config", None))
    starts = [getattr(config, "decoder_start_token_id", None) for config in known]
    start = next((i for i in starts if i is not None), None)
    if given is None:
        if start is None:
            raise ValueError(
                "decoder_tokens: wanted some, as the model's configuration has no "
                "decoder_start_token_id; got None"
            )
        return [torch.cat([row.new_tensor([start]), row[:-1]]) for row in rows]
    if isinstance(given, Tensor) and mask is None:
        mask = torch.ones_like(given)  # a decoder's start token is often the pad token
    decoder, _ = _rows(model, given, mask, None)
    if len(decoder) != len(rows):
        raise ValueError(
            f"decoder_tokens: wanted one for each of {len(rows)} prompts; got {len(decoder)}"
        )
    return decoder


def _rows(
    model: Any, tokens: Any, attention_mask: Tensor | None, prepend_bos: bool | None
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Each prompt's ids, and from where to where they lay in the padded row."""
    if isinstance(tokens, str):
        tokens = [tokens]
    if isinstance(tokens, np.ndarray):
        tokens = torch.as_tensor(tokens)
    if isinstance(tokens, Tensor):
        _refuse_bos(prepend_bos)
        return _from_tensor(model, tokens, attention_mask)
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask: wanted token ids [batch, pos] beside it; got {type(tokens).__name__}"
        )
    if not isinstance(tokens, Sequence) or isinstance(tokens, bytes):
        raise TypeError(f"tokens: wanted text or token ids; got {type(tokens).__name__}")
    items = list(tokens)
    if not items:
        raise ValueError("tokens: wanted one prompt or more; got none")
    if all(isinstance(item, Integral) for item in items):
        items = [items]
    rows = []
    for index, item in enumerate(items):
        if isinstance(item, str):
            if not item.strip():
                raise ValueError(f"prompt {index}: wanted text; got an empty one")
            rows.append(_from_text(model, item, index, prepend_bos))
        else:
            _refuse_bos(prepend_bos)
            if isinstance(item, Sequence) and not len(item):
                raise ValueError(f"prompt {index}: wanted integer ids; got none")
            rows.append(_integers(torch.as_tensor(item).cpu(), 1))
    return rows, [(0, len(row)) for row in rows]


def _refuse_bos(prepend_bos: bool | None) -> None:
    if prepend_bos is not None:
        raise ValueError(f"prepend_bos: wanted text beside it; got {prepend_bos} and token ids")


def _from_text(model: Any, text: str, index: int, prepend_bos: bool | None) -> Tensor:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            f"prompt {index}: wanted token ids, as the model has no tokenizer; got text"
        )
    # Without truncate=False a long text is cut to the context, and nobody is told.
    ids: Tensor = model.to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0].cpu()
    pad = _own_pad_token(model)
    if pad is not None and bool((ids == pad).any()):
        raise ValueError(
            f"prompt {index}: wanted text of the tokenizer's vocabulary; got {text!r}, of which a "
            "part becomes the pad token"
        )
    return ids


def _own_pad_token(model: Any) -> int | None:
    """The pad token's id, where it is not also the first or the last token of a text."""
    tokenizer = getattr(model, "tokenizer", None)
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")}
    return None if pad in ends else pad


def _integers(ids: Tensor, n_dims: int) -> Tensor:
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != n_dims:
        raise TypeError(
            f"tokens: wanted integer ids with {n_dims} axis or axes; got {ids.dtype} of shape "
            f"{list(ids.shape)}"
        )
    return ids.long()


def _from_tensor(
    model: Any, tokens: Tensor, attention_mask: Tensor | None
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    ids = _integers(tokens.cpu(), 2 if tokens.ndim != 1 else 1)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.numel() == 0:
        raise ValueError(f"tokens: wanted one token or more; got shape {list(ids.shape)}")
    mask = _pad_mask(model, ids) if attention_mask is None else torch.as_tensor(attention_mask)
    mask = mask.cpu()
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: wanted the shape of the tokens {list(ids.shape)}; got "
            f"{list(mask.shape)}"
        )
    spans = real_spans(mask)
    rows = [row[first:end] for row, (first, end) in zip(ids, spans, strict=True)]
    return rows, spans


def _pad_mask(model: Any, ids: Tensor) -> Tensor:
    """1 for real tokens: the tokenizer's own pad token at either end of a row is padding."""
    pad = _own_pad_token(model)
    if pad is None:
        return torch.ones_like(ids)
    real = ids != pad
    after_first = real.cumsum(1) > 0
    before_last = real.flip(1).cumsum(1).flip(1) > 0
    mask: Tensor = (after_first & before_last).long()
    return mask


def _strings(model: Any, row: Tensor) -> tuple[str, ...]:
    if getattr(model, "tokenizer", None) is None:
        return tuple(str(int(i)) for i in row)
    return tuple(str(s) for s in model.to_str_tokens(row.to(input_device(model))))
