"""Converts texts, conversations, lists and padded tensors to rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.kernels import MASKED
from hooks.model.given import (
    as_list,
    chat_ids,
    is_chat,
    is_ids,
    knows_words,
    shorten,
    tensor_of,
    text_ids,
)
from hooks.model.inputs import real_spans


def token_rows(
    model: Any, tokens: Any, attention_mask: Any, prepend_bos: bool | None, lengths: tuple[int, ...]
) -> tuple[list[Tensor], list[tuple[int, int]], list[str]]:
    """Each prompt's ids, where they began and ended in the padded row, and notes."""
    if isinstance(tokens, str) or is_chat(tokens):
        tokens = [tokens]
    if isinstance(tokens, np.ndarray) and tokens.dtype.kind not in "OSU":
        tokens = tensor_of(tokens)
    if isinstance(tokens, Tensor):
        refuse_bos(prepend_bos)
        return _from_tensor(model, tokens, attention_mask, lengths)
    items = as_list(tokens)
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask: wanted token ids [batch, pos] beside it; got {type(tokens).__name__}"
        )
    if not items:
        raise ValueError("tokens: wanted one prompt or more; got none")
    if is_ids(items):
        items = [items]
    rows, notes = [], []
    for index, item in enumerate(items):
        row, note = _row(model, item, index, prepend_bos)
        rows.append(row)
        notes.append(note)
    return rows, [(0, len(row)) for row in rows], _counted(notes)


def _row(model: Any, item: Any, index: int, prepend_bos: bool | None) -> tuple[Tensor, str]:
    """The ids of one prompt of a list."""
    if isinstance(item, str):
        if not item.strip():
            raise ValueError(f"prompt {index}: wanted text; got an empty one")
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None or not knows_words(tokenizer):
            has = "no tokenizer" if tokenizer is None else "a tokenizer without a vocabulary"
            raise ValueError(f"prompt {index}: wanted token ids, as the model has {has}; got text")
        ids, note, _ = text_ids(model, item, prepend_bos)
        pad = own_pad_token(model)
        if pad is not None and int((ids == pad).sum()) > item.count(model.tokenizer.pad_token):
            raise ValueError(
                f"prompt {index}: wanted text of the tokenizer's vocabulary; got {shorten(item)}, "
                "of which a part becomes the pad token"
            )
        return ids, note
    refuse_bos(prepend_bos)
    if is_chat(item):
        return chat_ids(model, item), "conversations are written by the tokenizer's chat template"
    if isinstance(item, Sequence) and not len(item):
        raise ValueError(f"prompt {index}: wanted at least 2 tokens; got none")
    try:
        ids = tensor_of(item).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(
            f"prompt {index}: wanted text or integer ids; got {shorten(item)}"
        ) from None
    return integers(ids, 1), ""


def _counted(notes: Sequence[str]) -> list[str]:
    """Each note once, with its number of prompts where it is not about all."""
    out = []
    for note in dict.fromkeys(n for n in notes if n):
        count = notes.count(note)
        out.append(note if count == len(notes) else f"{note} ({count} of {len(notes)} prompts)")
    return out


def refuse_bos(prepend_bos: bool | None) -> None:
    """Refuse ``prepend_bos`` with token ids, which are taken as they are."""
    if prepend_bos is not None:
        raise ValueError(f"prepend_bos: wanted text beside it; got {prepend_bos} and token ids")


def integers(ids: Tensor, n_dims: int) -> Tensor:
    """Ids as int64."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != n_dims:
        raise TypeError(
            f"tokens: wanted integer ids with {n_dims} axis or axes; got {ids.dtype} of shape "
            f"{list(ids.shape)}"
        )
    return ids.long()


def _from_tensor(
    model: Any, tokens: Tensor, attention_mask: Any, lengths: tuple[int, ...]
) -> tuple[list[Tensor], list[tuple[int, int]], list[str]]:
    ids = integers(tokens.cpu(), 2 if tokens.ndim != 1 else 1)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.numel() == 0:
        raise ValueError(f"tokens: wanted one token or more; got shape {list(ids.shape)}")
    notes: list[str] = []
    if attention_mask is not None:
        mask = _mask(attention_mask, ids)
    elif lengths:  # rows of unequal lengths, made one tensor here
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    else:
        mask = _pad_mask(model, ids)
        if not bool(mask.all()):
            pad = model.tokenizer.decode([own_pad_token(model)])
            notes.append(
                f"{pad!r} at the ends of rows is taken for padding (attention_mask= says what is)"
            )
    spans = real_spans(mask)
    rows = [row[first:end] for row, (first, end) in zip(ids, spans, strict=True)]
    return rows, spans, notes


def _mask(attention_mask: Any, ids: Tensor) -> Tensor:
    """The mask ``[batch, pos]`` of 0 and 1; ones for a mask ``[batch, head, query, key]``."""
    try:
        mask = tensor_of(attention_mask).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"attention_mask: wanted numbers of the shape of the tokens; got "
            f"{shorten(attention_mask)}"
        ) from None
    if mask.ndim == 4 and mask.shape[0] == len(ids) and mask.shape[2:] == (ids.shape[1],) * 2:
        _check_hides(mask)
        return torch.ones_like(ids)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: wanted the shape of the tokens {list(ids.shape)}; got "
            f"{list(mask.shape)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        other = float(mask[(mask != 0) & (mask != 1)][0])
        raise ValueError(
            f"attention_mask: wanted 1 for real tokens and 0 for padding; got {other:g}"
        )
    return mask.long()


def _check_hides(mask: Tensor) -> None:
    """Check that an additive mask hides keys or leaves them: anything else would be a bias."""
    other = torch.zeros_like(mask) if mask.dtype == torch.bool else mask
    strange = other[~((other == 0) | (other <= MASKED))]
    if len(strange):
        raise ValueError(
            f"attention_mask: wanted True and False, or 0 for what is seen and {MASKED:g} or less "
            f"for what is not, in a mask of four axes; got {float(strange[0]):g}"
        )


def own_pad_token(model: Any) -> int | None:
    """The pad token's id, where it is not also the first or last token of a text."""
    tokenizer = getattr(model, "tokenizer", None)
    pad: int | None = getattr(tokenizer, "pad_token_id", None)
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")}
    return None if pad in ends else pad


def _pad_mask(model: Any, ids: Tensor) -> Tensor:
    """1 for real tokens, 0 for pad tokens at the ends of rows, as far as they exceed other rows'.

    The longest row of a padded batch has no padding: what all rows have is text, and so is every
    pad token of a single row.
    """
    pad = own_pad_token(model)
    if pad is None or len(ids) < 2:
        return torch.ones_like(ids)
    real = ids != pad
    after_first = (real.cumsum(1) > 0).long()
    before_last = (real.flip(1).cumsum(1) > 0).long()
    mask = torch.ones_like(ids)
    at = torch.arange(ids.shape[1])
    for seen, flipped in ((after_first, False), (before_last, True)):
        run = (1 - seen).sum(1)
        padding = at < (run - run.min())[:, None]
        mask *= 1 - (padding.flip(1) if flipped else padding).long()
    return mask
