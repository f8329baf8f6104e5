"""Do cached steps of this model give what the whole pass gives? Tried on the model itself.

A few tokens are run under one noise, at once and in steps with the model's own cache: the logits
must agree, and would not if each step took its positions for the first ones.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from hooks.model import (
    AttentionTap,
    HookedModel,
    checking,
    evaluating,
    has_decoder,
    hooked,
    input_device,
    measurement,
    model_dtype,
    model_pass,
    short_input,
)
from hooks.noise.clock import CachedSteps, Clock, cache_in_output
from hooks.sites import AttentionSites, Hook

HookList = list[Hook]

_LAST_STEPS = (1, 2)  # new tokens of the steps after the first one
_TOLERANCE = 0.1  # of what wrong positions do
_NAMES = ("cache", "past_key_values", "layer_past")

_tried: weakref.WeakKeyDictionary[Any, tuple[AttentionSites, CachedSteps]] = (
    weakref.WeakKeyDictionary()
)


@measurement
def cached_steps(
    model: HookedModel, sites: AttentionSites, noising: Callable[[Clock, AttentionTap], HookList]
) -> CachedSteps:
    """The verdict on a model with ``original_model``, remembered as long as its self-check is.

    ``noising`` gives hooks of a strong noise in all layers, for a clock and a tap.
    """
    known = _tried.get(model)
    if known is not None and known[0] is sites:
        return known[1]
    with warnings.catch_warnings(), evaluating(model), checking():
        warnings.simplefilter("ignore")
        try:
            verdict = Trial(model, noising).verdict()
        except Exception as error:  # a model of its own kind; none of this matters without a cache
            verdict = CachedSteps(
                f"the check of its cache failed ({type(error).__name__}: {error})"
            )
    _tried[model] = (sites, verdict)
    return verdict


class Trial:
    """A trial of some tokens, at once and in steps."""

    def __init__(
        self, model: HookedModel, noising: Callable[[Clock, AttentionTap], HookList]
    ) -> None:
        self.model = model
        self.inner: Any = model.original_model  # type: ignore[attr-defined]
        self.noising = noising
        given = short_input(model, 1, set(), attempt=1)
        device = input_device(model)
        self.named = {"input_ids": given.first.to(device)}
        self.grows = "decoder_input_ids" if has_decoder(model) else "input_ids"
        if self.grows in given.named:
            self.named[self.grows] = given.named[self.grows].to(device)
        self.length = int(self.named[self.grows].shape[1])
        last = _LAST_STEPS if self.length > sum(_LAST_STEPS) else _LAST_STEPS[:1]
        self.steps = (self.length - sum(last), *last)
        self.held = -1  # positions that the cache said to hold after the first step

    def verdict(self) -> CachedSteps:
        """Judge each step by itself."""
        whole = self.run((self.length,), Clock(0, {}))
        stepped = self.run(self.steps, Clock(0, {}))
        if stepped is None:
            return CachedSteps("this model returns no cache that says how much it holds")
        if self.held != self.steps[0]:
            return CachedSteps(f"{self._versions()}: {self._held()}")
        blind = Clock(0, {})
        blind.blind = True
        lost = self.run(self.steps, blind)
        assert whole is not None
        assert lost is not None
        failed = []
        first = self.steps[0]
        for new in self.steps[1:]:
            at = slice(first, first + new)
            error, effect = (float((x[:, at] - whole[:, at]).abs().max()) for x in (stepped, lost))
            if not error <= _TOLERANCE * effect:
                failed.append(
                    (new, f"logits off by {error:.2g}, by {effect:.2g} at wrong positions")
                )
            first += new
        if not failed:
            return CachedSteps()
        whose = "without noise too" if self._wrong_without_noise() else "under noise"
        why = f"{self._versions()}: {failed[0][1]}, {whose}"
        return CachedSteps(wrong=why) if failed[0][0] == 1 else CachedSteps(several_wrong=why)

    def run(self, steps: Sequence[int], clock: Clock | None) -> Tensor | None:
        """Logits of all positions, under noise if there is a clock; None without a cache."""
        cache, name, first, logits = None, "", 0, []
        with ExitStack() as stack:
            if clock is not None:
                tap = AttentionTap()
                stack.enter_context(hooked(self.model, self.noising(clock, tap)))
                if tap.needed:
                    stack.enter_context(tap.of_passes(self.inner))
                stack.enter_context(clock.following(self.inner))
            for new in steps:
                named = dict(self.named)
                named[self.grows] = named[self.grows][:, first : first + new]
                options = {} if cache is None else {name or self._name(): cache}
                if len(steps) > 1:
                    options["use_cache"] = True
                with model_pass():
                    output = self.inner(**named, **options)
                if len(steps) > 1 and cache is None:
                    name, cache = cache_in_output(output)
                    if cache is None:
                        return None
                    self.held = int(cache.get_seq_length())
                logits.append(_logits(output).float())
                first += new
        return torch.cat(logits, 1)

    def _wrong_without_noise(self) -> bool:
        whole, stepped = self.run((self.length,), None), self.run(self.steps, None)
        assert whole is not None
        assert stepped is not None
        eps = torch.finfo(model_dtype(self.model)).eps
        return bool((stepped - whole).abs().max() > eps**0.5 * whole.abs().max())

    def _name(self) -> str:
        """The name of a cache that was returned in a tuple."""
        takes = inspect.signature(self.inner.forward).parameters
        return next((name for name in _NAMES if name in takes), _NAMES[0])

    def _held(self) -> str:
        return f"after {self.steps[0]} tokens the cache holds {self.held}, so that steps are lost"

    def _versions(self) -> str:
        names = {"transformer-lens": "TransformerLens", "transformers": "transformers"}
        return " with ".join(f"{shown} {version(name)}" for name, shown in names.items())


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    logits: Tensor = output[0] if found is None else found
    return logits
