"""User input, in the one form that `encode` reads.

Texts, chat messages, token ids of any kind, what a tokenizer or a collator returns and rows of a
data set become texts, rows of ids, or a mapping of tensors with an axis of prompts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hooks.arguments import near
from hooks.errors import UnsupportedModelError

MaskLike: TypeAlias = Iterable[Any] | np.ndarray | Tensor
"""1 for real tokens and 0 for padding, ``[batch, pos]``; or what a model takes for each query and
key, ``[batch, head or 1, query, key]``."""

# What tokenizers and collators return beside a model's inputs.
_NO_INPUT = frozenset(
    {
        "length",
        "num_truncated_tokens",
        "offset_mapping",
        "overflow_to_sample_mapping",
        "overflowing_tokens",
        "special_tokens_mask",
        # All logits are read, whatever a call would return.
        "logits_to_keep",
        "num_logits_to_keep",
    }
)
_CACHES = frozenset(
    {"past_key_values", "cache", "cache_params", "cache_position", "layer_past", "encoder_outputs"}
)
LABELS = "labels"
# Named inputs of a pass over tokens alone: a few random tokens can replace them in a check.
TOKENS_ALONE = frozenset(
    {"attention_mask", "position_ids", "token_type_ids", "decoder_input_ids", "use_cache"}
    | {"decoder_attention_mask", LABELS}
)
# Arguments that are a tensor for each token, or several.
_PER_TOKEN = frozenset({"input_ids", *TOKENS_ALONE}) - {"use_cache"}


@dataclass(frozen=True)
class Named:
    """Named inputs.

    Attributes:
        values: tensors ``[batch, ...]``, and options that are not tensors.
        lengths: how many entries each prompt had, where they were rows of unequal lengths.
        left_out: names that are not inputs of a model.
    """

    values: dict[str, Any]
    lengths: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()


def first_name(model: Any) -> str:
    """Name of the model's first input."""
    if getattr(model.cfg, "is_visual_model", False):
        return "pixel_values"
    return "input_values" if getattr(model.cfg, "is_audio_model", False) else "input_ids"


def arguments_of(model: Any) -> set[str]:
    """Names of the arguments of the model's forward pass."""
    forward = getattr(getattr(model, "original_model", None), "forward", None)
    return set(inspect.signature(forward).parameters) if callable(forward) else set()


def is_named(tokens: Any) -> bool:
    """Whether these are named inputs: a mapping, or rows of a data set (not chat messages)."""
    return isinstance(tokens, Mapping) or _each_has("input_ids", tokens)


def _each_has(name: str, rows: Any) -> bool:
    """Whether these are one mapping or more in a list, each with that name."""
    several = isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)) and len(rows) > 0
    return several and all(isinstance(row, Mapping) and name in row for row in rows)


def rows_of(tokens: Any) -> Any:
    """A data frame as named columns, a data set or an iterator as the list of its rows.

    Anything else is returned as it is.
    """
    if isinstance(tokens, Tensor):
        return dense("tokens", tokens)
    if isinstance(tokens, (Sequence, Mapping)):
        return tokens
    if isinstance(tokens, Iterator):
        return list(tokens)
    if hasattr(tokens, "columns") and hasattr(tokens, "__array__"):
        return {name: list(tokens[name]) for name in tokens.columns}
    if hasattr(tokens, "__array__") or not hasattr(tokens, "__getitem__"):
        return tokens
    return [tokens[i] for i in range(len(tokens))] if hasattr(tokens, "__len__") else tokens


def dense(name: str, given: Tensor) -> Tensor:
    """A tensor whose numbers can be read.

    Raises:
        TypeError: it is sparse, nested or on the meta device.
    """
    kind = "nested" if given.is_nested else str(given.layout).removeprefix("torch.")
    kind = "meta" if given.device.type == "meta" else kind
    if kind != "strided":
        raise TypeError(f"{name}: wanted a dense tensor of numbers; got a {kind} one")
    return given


def is_chat(tokens: Any) -> bool:
    """Whether this is one conversation: messages with a role and a content."""
    return _each_has("role", tokens)


def named(model: Any, tokens: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Named:
    """Named inputs as tensors.

    Raises:
        ValueError: the model's first input is missing; a cache; a name that the model does not
            take; rows whose lengths differ between inputs.
        TypeError: neither a tensor nor a list of numbers.
    """
    if not isinstance(tokens, Mapping):
        tokens = _collated(tokens)
    first = first_name(model)
    if first not in tokens:
        raise ValueError(f"inputs: wanted {first!r} among them; got {sorted(map(str, tokens))}")
    for name in tokens:
        if name in _CACHES and tokens[name] is not None:
            raise ValueError(
                f"inputs: wanted whole prompts; got {name!r}, which stands for earlier tokens"
            )
    _refuse_unknown(model, tokens)
    left_out = tuple(n for n in tokens if n in _NO_INPUT)
    kept = {n: v for n, v in tokens.items() if n not in _NO_INPUT and v is not None}
    lengths: dict[str, tuple[int, ...]] = {}
    values: dict[str, Any] = {}
    for name, value in kept.items():
        values[name] = _tensor(name, value, lengths)
    return Named(values, _agreeing(lengths, first), left_out)


def _collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows of a data set as one list per name."""
    names = set(rows[0])
    for index, row in enumerate(rows):
        if set(row) != names:
            raise ValueError(
                f"inputs: wanted the same names in each row; got {sorted(names)} and, in row "
                f"{index}, {sorted(row)}"
            )
    return {name: [row[name] for row in rows] for name in rows[0]}


def _refuse_unknown(model: Any, tokens: Mapping[str, Any]) -> None:
    """Refuse unknown names: their inputs would be dropped silently."""
    takes = arguments_of(model)
    if not takes:
        return
    known = takes | _NO_INPUT | TOKENS_ALONE | {"decoder_attention_mask", first_name(model)}
    # Options such as output_attentions travel in **kwargs.
    strange = [n for n, v in tokens.items() if n not in known and not isinstance(v, bool)]
    if not strange:
        return
    raise ValueError(
        f"inputs: wanted names that the model's forward pass takes; got {strange[0]!r}"
        f"{near(str(strange[0]), known)}"
    )


def _tensor(name: str, value: Any, lengths: dict[str, tuple[int, ...]]) -> Any:
    """A value as a tensor with an axis of prompts; options and the like unchanged."""
    if isinstance(value, (bool, str)) or not isinstance(value, (Iterable, np.ndarray, Tensor)):
        if name in _PER_TOKEN:
            raise TypeError(f"inputs: wanted numbers in {name!r}; got {shorten(value)}")
        return value
    array = None if isinstance(value, Tensor) or not hasattr(value, "__array__") else value
    if isinstance(value, Tensor):
        whole = dense(name, value)
    elif array is not None and np.asarray(array).dtype.kind in "biufc":
        whole = tensor_of(array)
    else:  # arrays of objects are rows of unequal lengths
        whole = _from_rows(name, list(value), lengths)
    if whole.dtype in _UNSIGNED:
        whole = whole.long()
    return whole[None] if whole.ndim == 1 and name in _PER_TOKEN else whole


_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def tensor_of(value: Any) -> Tensor:
    """Numbers as a tensor; also from arrays of another byte order or with negative strides."""
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return torch.as_tensor(native.reshape(array.shape))  # which has one axis at least


def _from_rows(name: str, rows: list[Any], lengths: dict[str, tuple[int, ...]]) -> Tensor:
    if not rows:
        raise ValueError(f"inputs: wanted one prompt or more in {name!r}; got none")
    parts = []
    for index, row in enumerate(rows):
        try:
            parts.append(tensor_of(row))
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"inputs: wanted numbers in {name!r}; got {shorten(row)} in row {index}"
            ) from None
    sizes = {tuple(part.shape) for part in parts}
    if len(sizes) == 1:
        return torch.stack(parts)
    if any(part.ndim != 1 for part in parts) or name not in _PER_TOKEN:
        raise ValueError(
            f"inputs: wanted entries of one shape in {name!r}; got {sorted(sizes)[:3]}"
        )
    lengths[name] = tuple(len(part) for part in parts)
    fill = -100 if name == LABELS else 0
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def _agreeing(lengths: Mapping[str, tuple[int, ...]], first: str) -> tuple[int, ...]:
    """The lengths of the prompts; a decoder's are its own."""
    of_prompts = {n: v for n, v in lengths.items() if not n.startswith("decoder_") and n != LABELS}
    if len(set(of_prompts.values())) > 1:
        some = {name: list(values[:3]) for name, values in of_prompts.items()}
        raise ValueError(f"inputs: wanted rows of the same lengths in each; got {some}")
    if of_prompts and first not in of_prompts:
        name = next(iter(of_prompts))
        raise ValueError(f"inputs: wanted rows as long as the tokens in {name!r}; got others")
    return lengths.get(first, ())


# -- text ---------------------------------------------------------------------------------------


def chat_ids(model: Any, messages: Sequence[Mapping[str, Any]]) -> Tensor:
    """The ids that the tokenizer's chat template makes of a conversation.

    Raises:
        ValueError: no tokenizer, no template, or one that refuses the messages.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if getattr(tokenizer, "chat_template", None) is None:
        got = "no tokenizer" if tokenizer is None else "a tokenizer without one"
        raise ValueError(f"messages: wanted a model with a chat template; got {got}")
    answers = messages[-1].get("role") == "assistant"
    try:
        text = tokenizer.apply_chat_template(  # type: ignore[union-attr]
            list(messages), tokenize=False, add_generation_prompt=not answers
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"messages: wanted what the chat template takes; got {shorten(messages)}: {error}"
        ) from error
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]


def knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has more than special tokens.

    From a directory without its files, transformers makes one that has not, and turns any text
    into one token.
    """
    known = len(tokenizer) if hasattr(tokenizer, "__len__") else math.inf
    return known > len(set(getattr(tokenizer, "all_special_tokens", ())))


def text_ids(model: Any, text: str, prepend_bos: bool | None) -> tuple[Tensor, str, list[int]]:
    """Token ids of a text, a note on its special tokens, and the ids without these.

    Special tokens that the text already has are not added again: those of a chat template, or a
    text's own first or last one. ``prepend_bos`` True or False always applies.
    """
    # Without truncate=False a long text is cut to the context, and nobody is told.
    ids = model.to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0].cpu()
    tokenizer = model.tokenizer
    row, bare = ids.tolist(), list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if prepend_bos is not None:
        twice = len(row) > 1 and row[0] == row[1] == tokenizer.bos_token_id
        said = "two BOS tokens, as prepend_bos=True asks" if twice and prepend_bos else ""
        return ids, said, bare
    around = added(row, bare, getattr(tokenizer, "eos_token_id", None))
    if around is None:
        return ids, "", bare
    before, after = around
    notes = []
    if before and bare and (before[-1] == bare[0] or bare[0] in _template_starts(tokenizer)):
        notes.append(f"text that begins with {tokenizer.decode(bare[:1])!r} got no BOS before it")
        before = []
    if after and bare and after[0] == bare[-1]:
        notes.append(f"text that ends with {tokenizer.decode(bare[-1:])!r} got none after it")
        after = []
    whole = [*before, *bare, *after]
    return torch.tensor(whole, dtype=ids.dtype), "; ".join(notes), bare


def added(row: list[int], bare: list[int], eos: Any) -> tuple[list[int], list[int]] | None:
    """What comes before and after a text's own ids; None where they are not found.

    TransformerLens removes the last EOS where a tokenizer appends one, even the text's own.
    """
    core = list(bare)
    while core and core[-1] == eos:
        core.pop()
    for at in range(len(row) - len(core) + 1):
        if row[at : at + len(core)] == core:
            tail, own = row[at + len(core) :], bare[len(core) :]
            return row[:at], tail[len(own) :] if tail[: len(own)] == own else []
    return None


def _template_starts(tokenizer: Any) -> set[int]:
    """The ids with which the chat template begins; none without one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return set()
    starts = set()
    for role in ("system", "user"):
        try:
            text = tokenizer.apply_chat_template([{"role": role, "content": "a"}], tokenize=False)
        except Exception:  # a template without this role
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        starts |= {ids[0]} & set(tokenizer.all_special_ids) if ids else set()
    return starts


def shorten(value: Any, room: int = 80) -> str:
    """A value for a message."""
    words = repr(value)
    return words if len(words) <= room else f"{words[: room - 4]} ..."


def refuse_other_inputs(what: str, names: Iterable[str]) -> None:
    """Refuse inputs that a measurement would not pass on."""
    some = sorted(names)
    if some:
        raise UnsupportedModelError(what, wanted="prompts of tokens alone", got=", ".join(some))


def as_list(tokens: Any) -> list[Any]:
    """Prompts of a list, a series or a column."""
    if isinstance(tokens, (bytes, dict, set, frozenset)) or not (
        isinstance(tokens, Sequence)
        or (hasattr(tokens, "__len__") and isinstance(tokens, Iterable))
    ):
        raise TypeError(f"tokens: wanted text or token ids; got {type(tokens).__name__}")
    return list(tokens)


def is_ids(items: Sequence[Any]) -> bool:
    """Whether these are the ids of one prompt."""
    return all(isinstance(item, Integral) and not isinstance(item, bool) for item in items)
