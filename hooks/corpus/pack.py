"""Documents packed into one window: no attention across them, and positions start again.

Each window is given with positions that begin at zero in each document, and with a mask that shows
a token the earlier ones of its own document alone. Whether a model heeds them is tried on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.corpus.cut import Window
from hooks.errors import UnsupportedModelError
from hooks.model import (
    HookedModel,
    Prompts,
    arguments_of,
    checking,
    encode,
    evaluating,
    has_decoder,
    key_of,
    pass_dtype,
    run_with,
)
from hooks.sites import LayerView, attention_sites, observe, once

_SHORT = (5, 9)  # tokens of documents before and after a long one
_CHECK = "documents packed into one window"
_Seen = list[tuple[str, Tensor]]


def prompts_of(model: HookedModel, windows: Sequence[Window], *, pack: bool) -> Prompts:
    """The windows as prompts; if packed, with positions and masks that keep documents apart."""
    prompts = encode(model, [window.ids for window in windows])
    if not pack:
        return prompts
    dtype = pass_dtype(model)
    spans = [_spans(window) for window in windows]
    each: dict[str, tuple[Tensor, ...]] = {
        **prompts.each,
        "position_ids": tuple(map(_positions, spans)),
        "attention_mask": tuple(_mask(some, dtype) for some in spans),
    }
    return replace(prompts, each=each, starts=tuple(tuple(w.starts) for w in windows))


def _spans(window: Window) -> list[tuple[int, int]]:
    """Where each document begins and ends."""
    return list(zip(window.starts, [*window.starts[1:], len(window)], strict=True))


def _positions(spans: Sequence[tuple[int, int]]) -> Int[Tensor, "pos"]:
    return torch.cat([torch.arange(end - first) for first, end in spans])


def _mask(spans: Sequence[tuple[int, int]], dtype: torch.dtype) -> Float[Tensor, "1 query key"]:
    """0 for the earlier tokens of a token's own document, the least number for all others."""
    n, least = spans[-1][1], torch.finfo(dtype).min
    mask = torch.full((1, n, n), least, dtype=dtype)
    for first, end in spans:
        own = torch.full((end - first, end - first), least, dtype=dtype)
        mask[0, first:end, first:end] = own.triu(1)
    return mask


def check_packing(model: HookedModel, context: int) -> None:
    """Refuse a model in which packed documents are not what they are alone.

    Three documents of random tokens, the middle one as long as ``context`` allows, and one as long
    as ``context``: patterns in all layers and logits of the packed pass must equal those of each
    document's own pass, up to rounding. Remembered until something of the model changes.

    Raises:
        UnsupportedModelError: they do not; the message says where.
    """
    if has_decoder(model):
        raise UnsupportedModelError(
            _CHECK, wanted="a decoder alone", got="an encoder-decoder, whose two texts go together"
        )
    missing = {"position_ids", "attention_mask"} - {*arguments_of(model)}
    if missing:
        raise UnsupportedModelError(
            _CHECK,
            wanted="a model that takes position_ids and an attention_mask",
            got=f"one without {' and '.join(sorted(missing))}",
        )
    once(model, ("packed", *key_of(model), context), lambda: _check(model, context))


def _check(model: HookedModel, context: int) -> None:
    before, after = _SHORT if context > 2 * sum(_SHORT) else (2, 2)
    lengths = [n for n in (before, context - before - after, after) if n > 1]
    for sizes in (lengths, [context]):
        documents = [_random(model, n, at) for at, n in enumerate(sizes)]
        window = Window(documents[0])
        for document in documents[1:]:
            window.add(document)
        spans = _spans(window)
        try:
            together = _seen(model, prompts_of(model, [window], pack=True), spans)
        except UnsupportedModelError:
            raise
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise UnsupportedModelError(_CHECK, wanted="a pass that runs", got=said) from error
        for packed, document in zip(together, documents, strict=True):
            prompts = prompts_of(model, [Window(document)], pack=False)
            (alone,) = _seen(model, prompts, [(0, len(document))])
            _compare(packed, alone, torch.finfo(pass_dtype(model)).eps ** 0.5)


def _random(model: HookedModel, n: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(model.cfg.d_vocab), (n,), generator=generator).tolist()


def _seen(model: HookedModel, prompts: Prompts, spans: Sequence[tuple[int, int]]) -> list[_Seen]:
    """What each document of the one window was seen to do."""
    lines: list[list[tuple[str, Tensor]]] = [[] for _ in spans]

    def reduce(view: LayerView) -> None:
        # A pattern as one number a row: the mean of fixed random numbers, one for each key.
        for (first, end), mine in zip(spans, lines, strict=True):
            weights = torch.rand(end - first, generator=torch.Generator().manual_seed(0)) + 1
            rows = view.pattern[0, :, first:end].double()
            seen = rows[..., first:end] @ weights.to(rows)
            away = rows.sum(-1) - rows[..., first:end].sum(-1)
            label = view.sites.label or str(view.sites.layer)
            mine.append((f"the pattern of layer {label}", torch.stack([seen, away]).cpu()))

    with checking():
        observe(model, list(attention_sites(model)), prompts, reduce)
        with evaluating(model):
            logits = run_with(model, prompts.batch([0]), [])
    if isinstance(logits, Tensor) and logits.ndim == 3:
        for (first, end), mine in zip(spans, lines, strict=True):
            mine.append(("logits", logits[0, first:end].double().cpu()))
    return lines


def _compare(packed: _Seen, alone: _Seen, room: float) -> None:
    for (what, mine), (_, own) in zip(packed, alone, strict=True):
        error = float((mine - own).abs().max())
        if not error <= room * float(own.abs().max()):
            raise UnsupportedModelError(
                _CHECK,
                wanted="what each document gives alone",
                got=f"{what} off by {error:.2g}: positions and a causal mask do not keep documents "
                "apart in this model; leave pack out",
            )
