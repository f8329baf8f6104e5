"""Texts or token ids to unpadded prompts, and prompts to batches of one length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooks.noise import real_spans
from hooks.sites import input_device


@dataclass(frozen=True)
class Prompts:
    """Token ids without padding, the padding that was cut off, and the tokens as strings."""

    ids: tuple[Int[Tensor, "_"], ...]
    padding: tuple[int, ...]
    strings: tuple[tuple[str, ...], ...]

    def batches(self, batch_size: int) -> list[tuple[list[int], Int[Tensor, "batch pos"]]]:
        """Prompts of one length together, at most ``batch_size``: (their indices, their ids)."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(self.ids):
            by_length[len(ids)].append(index)
        out = []
        for indices in by_length.values():
            for at in range(0, len(indices), batch_size):
                part = indices[at : at + batch_size]
                out.append((part, torch.stack([self.ids[i] for i in part])))
        return out


def encode(
    model: Any,
    tokens: str | Sequence[Any] | Tensor,
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    prepend_bos: bool | None = None,
) -> Prompts:
    """Prompts from a text, texts, ids ``[pos]`` or ``[batch, pos]``, or a list of ids.

    Raises:
        ValueError: nothing to probe, an id outside the vocabulary, one token only, or more tokens
            than the context holds.
        TypeError: something that is neither text nor integer ids.
    """
    rows, padding = _rows(model, tokens, attention_mask, prepend_bos)
    n_ctx = int(getattr(model.cfg, "n_ctx", 0) or 0)
    vocabulary = int(model.cfg.d_vocab)
    for index, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(
                f"prompt {index}: wanted at least 2 tokens (the first sees one key and can't "
                f"collapse); got {len(row)}"
            )
        if n_ctx and len(row) > n_ctx:
            raise ValueError(
                f"prompt {index}: wanted at most {n_ctx} tokens (the context); got {len(row)}"
            )
        if vocabulary > 0 and not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
            raise ValueError(
                f"prompt {index}: wanted token ids from 0 to {vocabulary - 1}; got "
                f"{int(row.min())} to {int(row.max())}"
            )
    return Prompts(tuple(rows), tuple(padding), tuple(_strings(model, row) for row in rows))


def _rows(
    model: Any, tokens: Any, attention_mask: Tensor | None, prepend_bos: bool | None
) -> tuple[list[Tensor], list[int]]:
    if isinstance(tokens, str):
        tokens = [tokens]
    if isinstance(tokens, np.ndarray):
        tokens = torch.as_tensor(tokens)
    if isinstance(tokens, Tensor):
        return _from_tensor(model, tokens, attention_mask)
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask: wanted token ids [batch, pos] beside it; got {type(tokens).__name__}"
        )
    if not isinstance(tokens, Sequence):
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
            rows.append(_integers(torch.as_tensor(item).cpu(), 1))
    return rows, [0] * len(rows)


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
) -> tuple[list[Tensor], list[int]]:
    ids = _integers(tokens.cpu(), 2 if tokens.ndim != 1 else 1)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.numel() == 0:
        raise ValueError(f"tokens: wanted one token or more; got shape {list(ids.shape)}")
    mask = _pad_mask(model, ids) if attention_mask is None else attention_mask.cpu()
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: wanted the shape of the tokens {list(ids.shape)}; got "
            f"{list(mask.shape)}"
        )
    spans = real_spans(mask)
    rows = [row[first:end] for row, (first, end) in zip(ids, spans, strict=True)]
    return rows, [ids.shape[1] - (end - first) for first, end in spans]


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
