"""Converts texts, token ids or named inputs to unpadded prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.model import state
from hooks.model.decoder import (
    OF_DECODER,
    check_ids,
    per_position,
    strings_of,
    with_decoder,
    with_decoder_positions,
)
from hooks.model.given import (
    LABELS,
    arguments_of,
    first_name,
    is_named,
    named,
    rows_of,
    shorten,
    tensor_of,
)
from hooks.model.inputs import ModelInput, check_model, has_decoder
from hooks.model.prompts import Prompts, Spans
from hooks.model.token_rows import refuse_bos, token_rows


def encode(
    model: Any,
    tokens: Any,
    *,
    decoder_tokens: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
) -> Prompts:
    """Prompts from texts, chat messages, ids, or what a tokenizer or a collator returns.

    A text; ids ``[pos]`` or ``[batch, pos]`` (tensor, array or lists); one conversation (messages
    with ``role`` and ``content``); a list of texts, ids and conversations; named inputs, or rows of
    a data set that hold them. What your forward pass would get is what is measured: masks,
    positions and options are passed on, padding is cut off. Prompts stay as they are.

    Raises:
        ValueError: nothing to probe, an id outside the vocabulary, only one token, more tokens than
            the context holds, a cache, or an input that the model does not take.
        TypeError: something that is neither text nor integer ids.
    """
    check_model(model)
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise TypeError(f"prepend_bos: wanted True, False or None; got {shorten(prepend_bos)}")
    if isinstance(tokens, Prompts):
        return _as_they_are(tokens, decoder_tokens=decoder_tokens, attention_mask=attention_mask)
    values: dict[str, Any] = {}
    lengths: tuple[int, ...] = ()
    notes: list[str] = []
    decoder_mask = labels = None
    tokens = rows_of(tokens)
    if is_named(tokens):
        given = named(model, tokens)
        values, lengths = given.values, given.lengths
        attention_mask = _one_of_two(values, "attention_mask", "attention_mask", attention_mask)
        decoder_tokens = _one_of_two(values, "decoder_input_ids", "decoder_tokens", decoder_tokens)
        decoder_mask = values.pop("decoder_attention_mask", None)
        labels = values.pop(LABELS, None)
        if given.left_out:
            notes.append(f"not part of what is measured, and left out: {', '.join(given.left_out)}")
        tokens = values.pop(first_name(model))
        if isinstance(tokens, Tensor):
            refuse_bos(prepend_bos)
    if isinstance(attention_mask, Iterator):
        attention_mask = list(attention_mask)
    if isinstance(tokens, Tensor) and tokens.is_floating_point():
        return _signals(model, tokens, values)
    rows, spans, said = token_rows(model, tokens, attention_mask, prepend_bos, lengths)
    for index, row in enumerate(rows):
        check_ids(model, row, f"prompt {index}", least=2)
    width = int(tokens.shape[-1]) if isinstance(tokens, (Tensor, np.ndarray)) else 0
    whole = lengths or tuple(width or end - at for at, end in spans)
    others = _beside({n: x for n, x in values.items() if n != OF_DECODER}, spans, width)
    mask = None if attention_mask is None else tensor_of(attention_mask)
    if mask is not None and mask.ndim == 4:
        others["each"]["attention_mask"] = tuple(mask.cpu())
    prompts = Prompts(
        first=tuple(rows),
        padding=tuple(n - (end - at) for n, (at, end) in zip(whole, spans, strict=True)),
        strings=tuple(strings_of(model, row) for row in rows),
        masked=mask is not None and mask.ndim < 4 and "attention_mask" in arguments_of(model),
        spans=tuple(spans),
        width=width,
        notes=(*notes, *said),
        **others,
    )
    prompts = replace(prompts, starts=_starts(prompts))
    ids = tensor_of(tokens).long().cpu().reshape(-1, width) if width else None
    if has_decoder(model):
        prompts, target = with_decoder(model, prompts, decoder_tokens, decoder_mask, labels)
        prompts = with_decoder_positions(prompts, values.get(OF_DECODER))
        return _behind_padding(model, prompts, ids, target, values)
    prompts = _behind_padding(model, prompts, ids, None, values)
    if decoder_tokens is not None or decoder_mask is not None:
        raise ValueError(
            f"decoder_tokens: wanted an encoder-decoder model; got {type(model).__name__} "
            "without a decoder of its own"
        )
    if labels is not None:
        prompts = replace(prompts, notes=(*prompts.notes, "labels are not part of the pass"))
    return prompts


def _as_they_are(prompts: Prompts, **beside: Any) -> Prompts:
    for name, value in beside.items():
        if value is not None:
            raise ValueError(f"{name}: wanted none beside prompts that have it; got it too")
    return prompts


def _behind_padding(
    model: Any,
    prompts: Prompts,
    ids: Tensor | None,
    target: Tensor | None,
    values: Mapping[str, Any],
) -> Prompts:
    """Prompts with the shortest one of each kind of padding, as it was given.

    Batched with the longest, which decides in some models how a whole batch is rotated (rotary
    positions of two lengths).
    """
    if "attention_mask" not in arguments_of(model):
        ids = None
    sides = [
        (rows, spans)
        for rows, spans in ((ids, prompts.spans), (target, prompts.decoder_spans))
        if rows is not None
    ]
    lengths = [sum(s[at][1] - s[at][0] for _, s in sides) for at in range(len(prompts))]
    kinds: dict[tuple[bool, ...], int] = {}
    for at in sorted(range(len(prompts)), key=lengths.__getitem__):
        ends = [(spans[at], rows.shape[1]) for rows, spans in sides]
        kind = tuple(x for (first, end), width in ends for x in (first > 0, end < width))
        if any(kind):
            kinds.setdefault(kind, at)
    apart = ids is None or (target is None and bool(prompts.decoder)) or bool(prompts.joined)
    padded = {}
    for at in kinds.values():
        longest = max(range(len(prompts)), key=lengths.__getitem__)
        beside = [at] if apart or longest == at else [at, longest]
        padded[at] = _as_given(model, prompts, beside, ids, target, values)
    return replace(prompts, padded=padded)


def _as_given(
    model: Any,
    prompts: Prompts,
    rows: list[int],
    ids: Tensor | None,
    target: Tensor | None,
    values: Mapping[str, Any],
) -> ModelInput:
    """These prompts with their padding."""
    if ids is None:
        source = prompts.batch(rows)
        first, named = source.first, dict(source.named)
    else:
        first, named = ids[rows], {"attention_mask": _real(ids, prompts.spans)[rows]}
        for name, value in values.items():
            several = isinstance(value, Tensor) and value.shape[:1] == (len(ids),)
            named[name] = value[rows] if several else value
    if target is not None:
        named["decoder_input_ids"] = target[rows]
        if "decoder_attention_mask" in arguments_of(model):
            named["decoder_attention_mask"] = _real(target, prompts.decoder_spans)[rows]
    elif prompts.decoder:
        named["decoder_input_ids"] = prompts.decoder[rows[0]][None]
    return ModelInput(first, named)


def _real(ids: Tensor, spans: Spans) -> Tensor:
    """1 for real tokens, 0 for padding."""
    mask = torch.zeros_like(ids)
    for row, (first, end) in enumerate(spans):
        mask[row, first:end] = 1
    return mask


def _one_of_two(values: dict[str, Any], name: str, argument: str, given: Any) -> Any:
    """An input that can be named or given as an argument, but not both."""
    if name in values and given is not None:
        raise ValueError(f"{argument}: wanted it once; got it beside {name!r} of the inputs too")
    return values.pop(name, given)


def _starts(prompts: Prompts) -> tuple[tuple[int, ...], ...]:
    """First tokens of each prompt: the first one, and each where positions fall back.

    Packed documents count by one from one number; a row may begin inside the first. Other positions
    mean no documents.
    """
    rows = prompts.each.get("position_ids", ())
    out = []
    for row in rows:
        falls = (row[1:] < row[:-1]).nonzero().flatten() + 1
        again = row[1:] == row[falls[0] if len(falls) else 0]
        counts = bool((again | (row[1:] == row[:-1] + 1)).all()) and not bool(again.all())
        out.append((0, *((again.nonzero().flatten() + 1).tolist() if counts else ())))
    return tuple(out) or ((0,),) * len(prompts)


_PER_POSITION = ("position_ids", "token_type_ids")


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
            continue
        if name in _PER_POSITION:
            value = per_position(name, value, len(spans), width)
        if value.shape[:1] == (len(spans),):
            own = name in _PER_POSITION or not value.is_floating_point()
            cut = width and value.shape[1:2] == (width,) and own
            each[name] = tuple(
                row[first:end] if cut else row
                for row, (first, end) in zip(value.cpu(), spans, strict=True)
            )
        elif len(spans) == 1:
            joined[name] = value.cpu()  # an axis of patches: those of a prompt follow each other
        else:
            raise ValueError(
                f"inputs: wanted {name!r} with an entry for each of {len(spans)} prompts, or one "
                f"prompt at a time; got shape {list(value.shape)}"
            )
    return {"each": each, "joined": joined, "plain": plain}


def _signals(model: Any, signals: Tensor, named: Mapping[str, Any]) -> Prompts:
    """Images ``[batch, channel, height, width]``, wave forms ``[batch, time]`` or spectrograms."""
    if first_name(model) == "input_ids":
        raise TypeError(
            f"tokens: wanted integer ids (this model reads tokens); got {signals.dtype} of shape "
            f"{list(signals.shape)}"
        )
    n_dims = (4,) if first_name(model) == "pixel_values" else (2, 3)
    if signals.ndim not in n_dims or not signals.numel():
        raise ValueError(
            f"{first_name(model)}: wanted {n_dims[-1]} axes, the prompts first; got shape "
            f"{list(signals.shape)}"
        )
    signals = signals.to(state.model_dtype(model)).cpu()
    n = len(signals)
    return Prompts(
        tuple(signals),
        (0,) * n,
        ((),) * n,
        spans=((0, 0),) * n,
        starts=((0,),) * n,
        **_beside(named, [(0, 0)] * n, 0),
    )
