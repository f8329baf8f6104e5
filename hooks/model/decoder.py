"""The decoder's tokens of an encoder-decoder: given, made from labels, or the prompt's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.model.given import arguments_of, tensor_of
from hooks.model.inputs import input_device
from hooks.model.prompts import Prompts, Spans
from hooks.model.token_rows import integers, token_rows


def per_position(name: str, value: Tensor, n_prompts: int, width: int) -> Tensor:
    """``[batch, pos]``; one row serves for all prompts, as in the model.

    Raises:
        ValueError: another shape, such as several numbers per position.
    """
    if value.ndim != 2 or value.shape[0] not in (1, n_prompts) or value.shape[1] != width:
        raise ValueError(
            f"inputs: wanted {name!r} of shape {[n_prompts, width]}, that of the tokens; got "
            f"{list(value.shape)}"
        )
    return value.expand(n_prompts, -1)


def check_ids(model: Any, row: Tensor, name: str, *, least: int) -> None:
    """Refuse a row that the model can't read.

    Raises:
        ValueError: fewer tokens than ``least``, more than the context holds, or unknown ids.
    """
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


def with_decoder(
    model: Any, prompts: Prompts, given: Any, mask: Any, labels: Any
) -> tuple[Prompts, Tensor | None]:
    """Prompts with the decoder's tokens: given, made from the labels, or the prompt's own.

    Also returns the tensor ``[batch, pos]`` in which they were given, if any.
    """
    notes: tuple[str, ...] = ()
    if isinstance(given, np.ndarray):
        given = tensor_of(given)
    if mask is not None and isinstance(given, (list, tuple)) and given and _even(given):
        given = tensor_of(given)  # padded rows, whatever form the prompts beside them have
    if isinstance(given, Tensor) and not given.is_floating_point():
        given = given.long()
    if mask is not None and tensor_of(mask).ndim > 2:
        raise ValueError(
            f"decoder_attention_mask: wanted [batch, pos]; got shape {list(tensor_of(mask).shape)}"
        )
    if labels is not None:
        labels = integers(torch.as_tensor(labels).cpu(), 2)
        if given is None:
            given = _from_labels(model, labels)
            notes = ("the decoder's tokens are the labels, shifted by one",)
        if mask is None and isinstance(given, Tensor) and given.shape == labels.shape:
            moved = torch.nn.functional.pad(labels[:, :-1] != IGNORED, (1, 0), value=True)
            mask = _until_last(moved)
    rows, spans = _decoder_rows(model, list(prompts.first), given, mask)
    target = given.reshape(len(rows), -1).cpu() if isinstance(given, Tensor) else None
    for index, row in enumerate(rows):
        check_ids(model, row, f"decoder's prompt {index}", least=1)
    prompts = replace(
        prompts,
        decoder=tuple(rows),
        decoder_strings=tuple(strings_of(model, row) for row in rows),
        decoder_masked=mask is not None and "decoder_attention_mask" in arguments_of(model),
        decoder_spans=tuple(spans),
        decoder_width=0 if target is None else target.shape[1],
        notes=(*prompts.notes, *notes),
    )
    return prompts, target


def with_decoder_positions(prompts: Prompts, given: Any) -> Prompts:
    """Prompts with positions ``[batch, pos]`` of the decoder's tokens, cut like these."""
    if given is None:
        return prompts
    spans, width = prompts.decoder_spans, prompts.decoder_width
    if not width:
        raise ValueError(
            f"inputs: wanted decoder_input_ids [batch, pos] beside {OF_DECODER!r}; got none"
        )
    rows = per_position(OF_DECODER, tensor_of(given), len(spans), width).cpu()
    cut = tuple(row[first:end] for row, (first, end) in zip(rows, spans, strict=True))
    return replace(prompts, each={**prompts.each, OF_DECODER: cut})


def _even(rows: Sequence[Any]) -> bool:
    """Whether each is a row of ids, all of one length."""
    lengths = {len(row) for row in rows if isinstance(row, (list, tuple, Tensor, np.ndarray))}
    return len(lengths) == 1 and all(hasattr(row, "__len__") for row in rows)


OF_DECODER = "decoder_position_ids"
IGNORED = -100
"""Label of a position that is not scored, as in PyTorch."""


def _until_last(real: Tensor) -> Tensor:
    """1 up to the last True of each row, and at its first position: a start token is real."""
    mask = (real.flip(1).cumsum(1).flip(1) > 0).long()
    mask[:, :1] = 1
    return mask


def _from_labels(model: Any, labels: Tensor) -> Tensor:
    """The labels shifted by one, as the model itself does where it gets only labels."""
    inner = model.original_model
    moved = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if not callable(moved):
        raise ValueError(
            "labels: wanted decoder_input_ids beside them, as the model does not say how it makes "
            "them of labels; got only labels"
        )
    out: Tensor = moved(labels=labels)
    return out


def _decoder_rows(
    model: Any, rows: list[Tensor], given: Any, mask: Any
) -> tuple[list[Tensor], Spans]:
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
        made = [torch.cat([row.new_tensor([start]), row[:-1]]) for row in rows]
        return made, tuple((0, len(row)) for row in made)
    if isinstance(given, Tensor) and mask is None:
        given = given[None] if given.ndim == 1 else given
        pads = {getattr(getattr(model, "tokenizer", None), "pad_token_id", None)}
        pads |= {getattr(config, "pad_token_id", None) for config in known}
        real = torch.ones_like(given, dtype=torch.bool)
        for pad in pads - {None}:  # a start token is often the pad token: it stays
            real &= given != pad
        mask = _until_last(real)
    decoder, spans, _ = token_rows(model, given, mask, None, ())
    if len(decoder) != len(rows):
        raise ValueError(
            f"decoder_tokens: wanted one for each of {len(rows)} prompts; got {len(decoder)}"
        )
    return decoder, tuple(spans)


def strings_of(model: Any, row: Tensor) -> tuple[str, ...]:
    """The decoder's tokens as strings; its ids without a tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return tuple(str(int(i)) for i in row)
    return tuple(str(s) for s in model.to_str_tokens(row.to(input_device(model))))
