"""May prompts of several lengths share a pass? Tried on the model, with prompts of the caller's.

Short prompts cost a pass each where their lengths differ: a pass over few tokens takes as long as
one over many. A token repeated at the end of the shorter prompts changes nothing for a causal
model, nor for one that is given a mask, unless it goes by the width of the batch (rotary positions
of two lengths).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model import (
    HookedModel,
    ModelInput,
    Prompts,
    checking,
    encode,
    evaluating,
    has_decoder,
    pass_dtype,
    users,
)
from hooks.sites.masks import Key
from hooks.sites.scores import visible
from hooks.sites.types import LayerSites
from hooks.sites.watch import SeenLayer, watch_layers

LONGEST = 512  # tokens; a pass over more costs what its tokens cost, and padding is not free
_LEAST = 5  # tokens of the short prompt of a trial with tokens of our own
_PASSES = 3  # that a trial takes
_NEVER = -1
_KEPT = 64  # verdicts of one model that are remembered

_Verdicts = dict[tuple[Any, ...], int]
_tried: weakref.WeakKeyDictionary[Any, _Verdicts] = weakref.WeakKeyDictionary()


def may_share(model: HookedModel, layers: Sequence[LayerSites], prompts: Prompts, key: Key) -> bool:
    """Whether these layers' scores are the same, within rounding, where shorter prompts are padded.

    The longest prompt and the shortest one are run together and alone, unless that would take more
    passes than it saves. The verdict is remembered, masked or not: up to the longest prompt that
    passed, or for good if one failed.
    """
    lengths = prompts.lengths
    longest, several = max(lengths, default=0), len({*lengths})
    if several < 2 or longest > LONGEST or users(model):
        return False
    verdicts = _tried.setdefault(model, {})
    question = (*key, *(sites.layer for sites in layers), prompts.masked)
    known = verdicts.get(question, 0)
    if known == _NEVER or longest <= known:
        return known != _NEVER
    if several <= _PASSES + 1:
        return False
    same = _same_together(model, layers, prompts)
    if len(verdicts) >= _KEPT:
        verdicts.clear()
    verdicts[question] = longest if same else _NEVER
    return same


def may_always_share(model: HookedModel, layers: Sequence[LayerSites], n: int) -> bool:
    """The same for any prompts of tokens alone, at most n and :data:`LONGEST` of them.

    Tried with tokens drawn at random, so that every process on every part of a corpus, and one that
    goes on after another, comes to the same verdict.
    """
    longest = min(n, LONGEST)
    if longest <= _LEAST or users(model) or has_decoder(model):
        return False
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.cfg.d_vocab), (longest,), generator=draw).tolist()
    return _same_together(model, layers, encode(model, [ids, ids[:_LEAST]]))


def _same_together(model: HookedModel, layers: Sequence[LayerSites], prompts: Prompts) -> bool:
    lengths = prompts.lengths
    long, short = (choose(range(len(lengths)), key=lengths.__getitem__) for choose in (max, min))
    n = lengths[short]
    eps = torch.finfo(pass_dtype(model)).eps ** 0.5
    try:
        with evaluating(model), checking():
            whole = _scores(model, layers, prompts.batch([long, short]))
            alone = [_scores(model, layers, prompts.batch([at])) for at in (long, short)]
    except (UnsupportedModelError, RuntimeError, ValueError, IndexError, TypeError):
        return False  # apart they are measured, or refused with their own words
    for index, both in whole.items():
        for row, of, end in zip(both, alone, (lengths[long], n), strict=True):
            mine = of[index][0]
            if mine.shape[-2:] != (end, end) or row.shape[-1] != lengths[long]:
                return False  # keys beside those of the tokens
            seen, shown = visible(mine), visible(row[:, :end])
            if bool(shown[..., end:].any()) or not torch.equal(seen, shown[..., :end]):
                return False
            a, b = mine[seen].double(), row[:, :end, :end][seen].double()
            if not bool(((a - b).abs() <= eps * a.abs().max()).all()):
                return False
    return True


def _scores(
    model: HookedModel, layers: Sequence[LayerSites], given: ModelInput
) -> dict[int, Tensor]:
    """Each layer's scores."""
    found: dict[int, Tensor] = {}

    def look(seen: SeenLayer) -> None:
        found[seen.index] = seen.scores_and_pattern()[0].detach().clone()

    watch_layers(model, given, layers, look)
    return found
