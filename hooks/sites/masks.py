"""Does the model compute the same with its masks and padding as without? Tried on the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import HookedModel, ModelInput, Prompts, checking, evaluating, key_of, pass_dtype

_LONGEST = 128  # tokens of a prompt of the caller's that a check runs copies of
Key = tuple[str, str]
_KEPT = 256  # questions about one model whose answer is remembered


def check_masks(model: HookedModel, prompts: Prompts, key: Key | None = None) -> None:
    """Refuse padding and masks that do not do to the model what they say; ``key``: the model's."""
    squares = prompts.each.get("attention_mask", ())
    square = next((i for i, x in enumerate(squares) if x.dtype == torch.bool), None)
    if prompts.padded or prompts.masked or square is not None:
        key = key_of(model) if key is None else key
        for at in prompts.padded:
            _check_padding(model, prompts, at, key)
        _check_mask(model, prompts, key)
        if square is not None:
            given = prompts.batch([square])
            once(model, ("square", *key), lambda: _check_square(model, given))


_passed: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def once(model: Any, question: tuple[Any, ...], check: Callable[[], None]) -> None:
    """Run a check of the model, unless it is known to pass."""
    known = _passed.setdefault(model, set())
    if question in known:
        return
    check()
    if len(known) >= _KEPT:
        known.clear()
    known.add(question)


def _check_padding(model: HookedModel, prompts: Prompts, at: int, key: tuple[str, str]) -> None:
    """Refuse padding that the model, or a user's hook, counts as positions or as length.

    A prompt must have the same logits with and without its padding.
    """
    given, cut = prompts.padded[at], prompts.batch([at])
    spans = (prompts.spans[at], *prompts.decoder_spans[at : at + 1])
    left = any(first > 0 for first, _ in spans)

    def check() -> None:
        with evaluating(model), checking():
            passes = [x.run(model) for x in (given, cut)]
        if not all(isinstance(x, Tensor) and x.ndim == 3 for x in passes):
            return
        whole, alone = (x[0].double() for x in passes)
        first, end = (prompts.decoder_spans if prompts.decoder else prompts.spans)[at]
        if len(whole) == len(alone):
            first, end = 0, len(alone)
        mine = whole[first:end]
        error = float((mine - alone).abs().max())
        room = torch.finfo(pass_dtype(model)).eps ** 0.5 * float(alone.abs().max())
        if not error <= room:
            raise UnsupportedModelError(
                "left padding" if left else "padding",
                wanted="a pass that is the same without its padding",
                got=f"logits off by {error:.2g}: {_why_padding_tells(mine, left)}",
            )

    once(model, ("padding", *key, spans, *_shape(given), *_shape(cut)), check)


def _shape(given: ModelInput) -> tuple[Any, ...]:
    """What may reveal padding: lengths, and the positions reached."""
    masks = [x for name, x in sorted(given.named.items()) if name.endswith("attention_mask")]
    positions = given.named.get("position_ids")
    reached = None if positions is None else int(positions.max())
    return *given.first.shape, reached, *(tuple(x.sum(-1).flatten().tolist()) for x in masks)


def _why_padding_tells(logits: Tensor, left: bool) -> str:
    if not bool(logits.isfinite().all()):  # TransformerLens's mask under autocast
        return (
            "rows of padding are not finite in this model's attention, and spread; pad on the "
            "right, or give lists"
        )
    if left:
        return (
            "this model counts positions from the first column, or a hook of yours goes by "
            "columns; pad on the right, or give lists"
        )
    return (
        "this model goes by the width of the batch (as rotary positions of two lengths do), or a "
        "hook of yours by columns; give lists, each of which is run at its own length"
    )


def _check_mask(model: HookedModel, prompts: Prompts, key: tuple[str, str]) -> None:
    """Refuse a mask of ones that shows a causal model its later tokens.

    A bridge may use a given mask in place of its own. Another last token must leave the logits
    before it unchanged, if it does so without the mask.
    """
    lengths = [len(x) if x.ndim == 1 and not x.is_floating_point() else 0 for x in prompts.first]
    at = min(range(len(prompts)), key=lambda i: (lengths[i] < 2, lengths[i]))
    if not prompts.masked or lengths[at] < 2 or prompts.decoder:
        return

    def reads_on(given: ModelInput) -> bool:
        """Whether logits depend on a later token."""
        other = given.first.clone()
        other[:, -1] = (other[:, -1] + 1) % int(model.cfg.d_vocab)
        passes = [replace(given, first=x).run(model) for x in (given.first, other)]
        if not all(isinstance(x, Tensor) and x.ndim == 3 for x in passes):
            return False
        a, b = (x[:, :-1].double() for x in passes)
        room = torch.finfo(pass_dtype(model)).eps ** 0.5 * float(a.abs().max())
        return not float((a - b).abs().max()) <= room

    def check() -> None:
        few = beginning(prompts.some([at]), set())
        with evaluating(model), checking():
            if reads_on(few.batch([0])) and not reads_on(replace(few, masked=False).batch([0])):
                raise UnsupportedModelError(
                    "a mask of ones",
                    wanted="a pass that hides later tokens with it as without it",
                    got="one that shows them: this bridge takes the mask in the place of its own, "
                    "so what it computes is another model's; give tokens without a mask",
                )

    once(model, ("mask", *key), check)


def _check_square(model: HookedModel, given: ModelInput) -> None:
    """Refuse True and False where the attention adds them to its scores, as 1 and 0.

    transformers' eager attention does; TransformerLens's own hides what is False.
    """
    dtype = pass_dtype(model)
    least, mask = torch.finfo(dtype).min, given.named["attention_mask"]
    # The last key that a row sees, alone: whatever it is added to, that leaves the others in sight.
    last = mask & (mask.long().cumsum(-1) == mask.sum(-1, keepdim=True))
    forms = (last, torch.where(last, 0.0, least).to(dtype))
    with evaluating(model), checking():
        passes = [
            replace(given, named={**given.named, "attention_mask": x}).run(model) for x in forms
        ]
    if all(isinstance(x, Tensor) for x in passes):
        a, b = (x.double() for x in passes)
        room = torch.finfo(dtype).eps ** 0.5 * float(b.abs().max())
        error = float((a - b).abs().max())
        if not error <= room:
            raise UnsupportedModelError(
                "a mask of True and False",
                wanted="a pass that hides what is False",
                got=f"logits off by {error:.2g} from those of 0 and {least:.2g}: this model's "
                "attention adds the mask to its scores, True as 1; give it in that form",
            )


def beginning(prompts: Prompts, avoid: set[int]) -> Prompts:
    """The beginning of one prompt, if possible of a length that is not a number of heads."""
    row = prompts.first[0]
    if row.ndim != 1 or row.is_floating_point() or prompts.joined or prompts.decoder:
        return prompts
    length = min(len(row), _LONGEST)
    length = next((n for n in range(length, 1, -1) if n not in avoid), length)
    if length == len(row):
        return prompts
    if any(rows[0].ndim != 1 or len(rows[0]) != len(row) for rows in prompts.each.values()):
        return prompts
    each = {name: (rows[0][:length],) for name, rows in prompts.each.items()}
    return replace(prompts, first=(row[:length],), each=each)
