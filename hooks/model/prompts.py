"""Texts, token ids or named inputs to unpadded prompts, and prompts to batches of one length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooks.model import state
from hooks.model.given import (
    LABELS,
    first_name,
    is_named,
    named,
    rows_of,
    shorten,
    taken,
    tensor_of,
)
from hooks.model.inputs import ModelInput, check_model, has_decoder, input_device, short_input
from hooks.model.token_rows import integers, refuse_bos, token_rows

Spans = tuple[tuple[int, int], ...]


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
        masked: whether a mask of ones goes with each prompt, as there was a mask in the user's
            call: transformers looks for packed prompts where there is none.
        decoder_masked: the same of the decoder's tokens.
        spans, width: from where to where the prompts lay in the rows that were given, and how wide
            these were; 0 where each had a length of its own.
        decoder_spans, decoder_width: the same of the decoder's tokens.
        padded: prompts that lay before or behind padding, as they were given: the shortest of each
            kind, by index, in a batch with the longest prompt.
        starts: positions of each prompt's first tokens: 0, and where a packed document begins.
        notes: what a reader must know of how they came to be.
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
        """Names of the tensors beside the tokens, their mask and the decoder's tokens."""
        return tuple(sorted({*self.each, *self.joined}))

    @property
    def packed(self) -> bool:
        """Whether a prompt holds several documents."""
        return any(len(starts) > 1 for starts in self.starts)

    def some(self, indices: Sequence[int]) -> Prompts:
        """Some of the prompts."""

        def pick(rows: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(rows[i] for i in indices) if rows else rows

        names = ("first", "padding", "strings", "decoder", "decoder_strings", "starts", "spans")
        picked: dict[str, Any] = {name: pick(getattr(self, name)) for name in names}
        each = {name: pick(rows) for name, rows in self.each.items()}
        return replace(self, each=each, decoder_spans=pick(self.decoder_spans), **picked)

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
        first = torch.stack([self.first[i] for i in indices])
        if self.masked:
            named["attention_mask"] = torch.ones(first.shape[:2], dtype=torch.long)
        if self.decoder:
            decoder = torch.stack([self.decoder[i] for i in indices])
            named["decoder_input_ids"] = decoder
            if self.decoder_masked:
                named["decoder_attention_mask"] = torch.ones_like(decoder)
        return ModelInput(first, named, frozenset(self.joined))


def example_of(model: Any, prompts: Prompts) -> ModelInput:
    """One short prompt: of random tokens, or the first one where there is more than tokens."""
    return prompts.batch([0]) if prompts.extra else short_input(model, 1, set())


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
    a data set that hold them. What a forward pass of the user's is given is what is measured:
    masks, positions and options go along, padding is cut off.

    Raises:
        ValueError: nothing to probe, an id outside the vocabulary, one token only, more tokens
            than the context holds, a cache, or an input that the model does not take.
        TypeError: something that is neither text nor integer ids.
    """
    check_model(model)
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise TypeError(f"prepend_bos: wanted True, False or None; got {shorten(prepend_bos)}")
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
            notes.append(f"no part of what is measured, and left out: {', '.join(given.left_out)}")
        tokens = values.pop(first_name(model))
        if isinstance(tokens, Tensor):
            refuse_bos(prepend_bos)
    if isinstance(attention_mask, Iterator):
        attention_mask = list(attention_mask)
    if isinstance(tokens, Tensor) and tokens.is_floating_point():
        return _signals(model, tokens, values)
    rows, spans, said = token_rows(model, tokens, attention_mask, prepend_bos, lengths)
    for index, row in enumerate(rows):
        _check_ids(model, row, f"prompt {index}", least=2)
    width = int(tokens.shape[-1]) if isinstance(tokens, (Tensor, np.ndarray)) else 0
    whole = lengths or tuple(width or end - at for at, end in spans)
    others = _beside({n: x for n, x in values.items() if n != _OF_DECODER}, spans, width)
    mask = None if attention_mask is None else tensor_of(attention_mask)
    if mask is not None and mask.ndim == 4:
        others["each"]["attention_mask"] = tuple(mask.cpu())
    prompts = Prompts(
        first=tuple(rows),
        padding=tuple(n - (end - at) for n, (at, end) in zip(whole, spans, strict=True)),
        strings=tuple(_strings(model, row) for row in rows),
        masked=mask is not None and mask.ndim < 4 and "attention_mask" in taken(model),
        spans=tuple(spans),
        width=width,
        notes=(*notes, *said),
        **others,
    )
    prompts = replace(prompts, starts=_starts(prompts))
    ids = tensor_of(tokens).long().cpu().reshape(-1, width) if width else None
    if has_decoder(model):
        prompts, target = _with_decoder(model, prompts, decoder_tokens, decoder_mask, labels)
        prompts = _with_decoder_positions(prompts, values.get(_OF_DECODER))
        return _behind_padding(model, prompts, ids, target, values)
    prompts = _behind_padding(model, prompts, ids, None, values)
    if decoder_tokens is not None or decoder_mask is not None:
        raise ValueError(
            f"decoder_tokens: wanted an encoder-decoder model; got {type(model).__name__} "
            "without a decoder of its own"
        )
    if labels is not None:
        prompts = replace(prompts, notes=(*prompts.notes, "labels are no part of the pass"))
    return prompts


def _behind_padding(
    model: Any,
    prompts: Prompts,
    ids: Tensor | None,
    target: Tensor | None,
    values: Mapping[str, Any],
) -> Prompts:
    """The same with the shortest prompt of each kind of padding, as it was given.

    Beside the longest, by which some models turn a whole batch (rotary positions of two lengths).
    """
    if "attention_mask" not in taken(model):
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
        if "decoder_attention_mask" in taken(model):
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
    """An input that can be named or given as an argument, and not as both."""
    if name in values and given is not None:
        raise ValueError(f"{argument}: wanted it once; got it beside {name!r} of the inputs too")
    return values.pop(name, given)


def _starts(prompts: Prompts) -> tuple[tuple[int, ...], ...]:
    """First tokens of each prompt: the first one, and where positions fall back.

    Packed documents count by one from one number; a row may begin inside of the first. Positions
    that go otherwise are no documents.
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
_OF_DECODER = "decoder_position_ids"


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
            value = _per_position(name, value, len(spans), width)
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


def _per_position(name: str, value: Tensor, n_prompts: int, width: int) -> Tensor:
    """``[batch, pos]``; one row stands for all prompts, as the model has it too.

    Raises:
        ValueError: another shape, such as several numbers to a position.
    """
    if value.ndim != 2 or value.shape[0] not in (1, n_prompts) or value.shape[1] != width:
        raise ValueError(
            f"inputs: wanted {name!r} of shape {[n_prompts, width]}, that of the tokens; got "
            f"{list(value.shape)}"
        )
    return value.expand(n_prompts, -1)


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


# -- the decoder of an encoder-decoder ----------------------------------------------------------


def _with_decoder(
    model: Any, prompts: Prompts, given: Any, mask: Any, labels: Any
) -> tuple[Prompts, Tensor | None]:
    """The same with the decoder's tokens: given, made of the labels, or the prompt's own.

    And the tensor ``[batch, pos]`` in which they were given, if they were.
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
            given, notes = (
                _from_labels(model, labels),
                ("the decoder's tokens are the labels, moved on by one",),
            )
        if mask is None and isinstance(given, Tensor) and given.shape == labels.shape:
            moved = torch.nn.functional.pad(labels[:, :-1] != IGNORED, (1, 0), value=True)
            mask = _until_last(moved)
    rows, spans = _decoder_rows(model, list(prompts.first), given, mask)
    target = given.reshape(len(rows), -1).cpu() if isinstance(given, Tensor) else None
    for index, row in enumerate(rows):
        _check_ids(model, row, f"decoder's prompt {index}", least=1)
    prompts = replace(
        prompts,
        decoder=tuple(rows),
        decoder_strings=tuple(_strings(model, row) for row in rows),
        decoder_masked=mask is not None and "decoder_attention_mask" in taken(model),
        decoder_spans=tuple(spans),
        decoder_width=0 if target is None else target.shape[1],
        notes=(*prompts.notes, *notes),
    )
    return prompts, target


def _with_decoder_positions(prompts: Prompts, given: Any) -> Prompts:
    """The same with positions ``[batch, pos]`` of the decoder's tokens, cut as these are."""
    if given is None:
        return prompts
    spans, width = prompts.decoder_spans, prompts.decoder_width
    if not width:
        raise ValueError(
            f"inputs: wanted decoder_input_ids [batch, pos] beside {_OF_DECODER!r}; got none"
        )
    rows = _per_position(_OF_DECODER, tensor_of(given), len(spans), width).cpu()
    cut = tuple(row[first:end] for row, (first, end) in zip(rows, spans, strict=True))
    return replace(prompts, each={**prompts.each, _OF_DECODER: cut})


def _even(rows: Sequence[Any]) -> bool:
    """Whether each is a row of ids, all of one length."""
    lengths = {len(row) for row in rows if isinstance(row, (list, tuple, Tensor, np.ndarray))}
    return len(lengths) == 1 and all(hasattr(row, "__len__") for row in rows)


IGNORED = -100
"""Label of a position that is not scored, as in PyTorch."""


def _until_last(real: Tensor) -> Tensor:
    """1 up to the last True of each row, and for its first position: a start token is real."""
    mask = (real.flip(1).cumsum(1).flip(1) > 0).long()
    mask[:, :1] = 1
    return mask


def _from_labels(model: Any, labels: Tensor) -> Tensor:
    """The labels moved on by one, as the model itself does it where it is given labels alone.

    Raises:
        ValueError: the model does not say how.
    """
    inner = model.original_model
    moved = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if not callable(moved):
        raise ValueError(
            "labels: wanted decoder_input_ids beside them, as the model does not say how it makes "
            "them of labels; got labels alone"
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


def _strings(model: Any, row: Tensor) -> tuple[str, ...]:
    if getattr(model, "tokenizer", None) is None:
        return tuple(str(int(i)) for i in row)
    return tuple(str(s) for s in model.to_str_tokens(row.to(input_device(model))))
