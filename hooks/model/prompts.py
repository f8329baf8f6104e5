"""Prompts of a measurement, without padding, and the batches made from them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooks.model.inputs import ModelInput, short_input

Spans = tuple[tuple[int, int], ...]

_PADDED, _FEW = 1.25, 64
"""A pass has at most so many positions for each real token, and so many more."""


@dataclass(frozen=True)
class Prompts:
    """The model's input, prompt by prompt, without padding, which is cut off and counted.

    Attributes:
        first: each prompt's token ids ``[pos]``, image or wave form.
        padding: padding positions that were cut off.
        strings: the tokens as strings; empty for images and sound.
        decoder: token ids that an encoder-decoder's decoder is given; empty for other models.
        decoder_strings: these ids as strings.
        each: other inputs, a tensor for each prompt.
        joined: for a single prompt, inputs joined along the first axis (image patches).
        plain: inputs that are not tensors, for all prompts.
        masked: whether each prompt gets a mask of ones, as the user's call had a mask: transformers
            looks for packed prompts where there is none.
        decoder_masked: whether the decoder's tokens get a mask of ones.
        spans, width: where the prompts began and ended in the given rows, and how wide these were;
            0 where each had a length of its own.
        decoder_spans, decoder_width: spans and width of the decoder's tokens.
        padded: prompts with padding before or after them, as given: the shortest of each kind, by
            index, in a batch with the longest prompt.
        starts: positions of each prompt's first tokens: 0, and where a packed document begins.
        notes: what a reader must know about how the prompts were made.
    """

    first: tuple[Tensor, ...]
    padding: tuple[int, ...]
    strings: tuple[tuple[str, ...], ...]
    decoder: tuple[Int[Tensor, "_"], ...] = ()
    decoder_strings: tuple[tuple[str, ...], ...] = ()
    each: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    joined: Mapping[str, Tensor] = field(default_factory=dict)
    plain: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False
    decoder_masked: bool = False
    spans: Spans = ()
    width: int = 0
    decoder_spans: Spans = ()
    decoder_width: int = 0
    padded: Mapping[int, ModelInput] = field(default_factory=dict)
    starts: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.first)

    @property
    def extra(self) -> tuple[str, ...]:
        """Names of the tensors besides the tokens, their mask and the decoder's tokens."""
        return tuple(sorted({*self.each, *self.joined}))

    @property
    def packed(self) -> bool:
        """Whether a prompt holds several documents."""
        return any(len(starts) > 1 for starts in self.starts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt, where these are all that it consists of; else nothing."""
        if self.decoder or self.extra or self.packed:
            return ()
        tokens = all(row.ndim == 1 and not row.is_floating_point() for row in self.first)
        return tuple(map(len, self.first)) if tokens else ()

    def some(self, indices: Sequence[int]) -> Prompts:
        """Some of the prompts."""

        def pick(rows: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(rows[i] for i in indices) if rows else rows

        names = ("first", "padding", "strings", "decoder", "decoder_strings", "starts", "spans")
        picked: dict[str, Any] = {name: pick(getattr(self, name)) for name in names}
        each = {name: pick(rows) for name, rows in self.each.items()}
        return replace(self, each=each, decoder_spans=pick(self.decoder_spans), **picked)

    def batches(
        self, batch_size: int, *, padded: bool = False
    ) -> list[tuple[list[int], ModelInput]]:
        """Prompts of one shape together, at most ``batch_size``: (their indices, the input).

        ``padded``: prompts of different lengths too, padded at the end.
        """
        if padded:
            return [(mixed, self.batch(mixed)) for mixed in self._mixed(batch_size)]
        by_shape: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, first in enumerate(self.first):
            decoder = len(self.decoder[index]) if self.decoder else 0
            by_shape[(tuple(first.shape), decoder)].append(index)
        return [
            (indices[at : at + batch_size], self.batch(indices[at : at + batch_size]))
            for indices in by_shape.values()
            for at in range(0, len(indices), batch_size)
        ]

    def _mixed(self, batch_size: int) -> list[list[int]]:
        """Prompts of similar lengths together, so that little of a pass is padding."""
        batches: list[list[int]] = []
        real = 0
        for index in sorted(range(len(self)), key=lambda i: len(self.first[i])):
            n = len(self.first[index])
            filled = bool(batches) and len(batches[-1]) < batch_size
            if filled and n * (len(batches[-1]) + 1) <= _PADDED * (real + n) + _FEW:
                batches[-1].append(index)
                real += n
            else:
                batches.append([index])
                real = n
        return batches

    def batch(self, indices: Sequence[int]) -> ModelInput:
        """Prompts as a model takes them: of one shape or, tokens alone, padded at the end."""
        named: dict[str, Any] = {**self.plain, **self.joined}
        named |= {n: torch.stack([rows[i] for i in indices]) for n, rows in self.each.items()}
        rows = [self.first[i] for i in indices]
        width = max(len(row) for row in rows)
        first = torch.stack([_padded(row, width) for row in rows])
        if self.masked:
            ends = torch.tensor([len(row) for row in rows])
            named["attention_mask"] = (torch.arange(width) < ends[:, None]).long()
        if self.decoder:
            decoder = torch.stack([self.decoder[i] for i in indices])
            named["decoder_input_ids"] = decoder
            if self.decoder_masked:
                named["decoder_attention_mask"] = torch.ones_like(decoder)
        return ModelInput(first, named, frozenset(self.joined))


Tokens: TypeAlias = str | Iterable[Any] | np.ndarray | Tensor | Prompts
"""A text, texts, chat messages, token ids, named inputs, or prompts that :func:`hooks.encode` made:
see :func:`hooks.collapse_probe`."""


def _padded(row: Tensor, width: int) -> Tensor:
    """A prompt of this width: its last token again and again, which any model takes."""
    if len(row) == width:
        return row
    return torch.cat([row, row[-1:].expand(width - len(row))])


def example_of(model: Any, prompts: Prompts) -> ModelInput:
    """One short prompt: random tokens, or the first prompt where the input is more than tokens."""
    return prompts.batch([0]) if prompts.extra else short_input(model, 1, set())
