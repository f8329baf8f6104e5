"""The passes of a sweep: which rows share a pass, where it begins and where it ends.

A pass holds prompts of one shape, each under its conditions. It ends before the unembedding, which
is then applied to the scored positions only, a cache's worth at a time; where only later layers are
noised, it begins with one clean row, which becomes many at the first noised block. Both are tried
on the model first, and left alone where they do not give what whole passes give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks.measures.sweep.factors import Grid, RowFactors
from hooks.model import (
    AttentionTap,
    Finished,
    HookedModel,
    ModelInput,
    Prompts,
    checked_logits,
    input_device,
    model_pass,
    paused_in_checks,
    run_with,
    standing_hooks,
)
from hooks.noise import HookList, NormNoise
from hooks.sites import AttentionSites, LayerSites

_UNEMBED = "unembed.hook_in"
_LARGE = 1000.0  # logits at which a soft cap or a scale after the unembedding shows


@dataclass(frozen=True)
class Pass:
    """Prompts, by index, each under these conditions."""

    prompts: tuple[int, ...]
    conditions: range


def passes(prompts: Prompts, grid: Grid, batch_size: int, *, alone: bool) -> Iterator[Pass]:
    """All passes of at most ``batch_size`` rows.

    Whole prompts share a pass, or one prompt takes several, with its clean row in the first;
    ``alone`` keeps prompts apart.
    """
    n = len(grid)
    together = 1 if alone else max(1, batch_size // n)
    parts = -(-n // batch_size)
    ranges = [range(i * n // parts, (i + 1) * n // parts) for i in range(parts)]
    for indices, _ in prompts.batches(together):
        for conditions in ranges:
            yield Pass(tuple(indices), conditions)


class Runner:
    """One model with the hooks of a sweep on it."""

    def __init__(
        self,
        model: HookedModel,
        noise: NormNoise,
        sites: AttentionSites,
        layers: Sequence[LayerSites],
        grid: Grid,
    ) -> None:
        self.model = model
        self.factors = RowFactors(noise, layers, grid)
        self.device = input_device(model)
        points = model.hook_dict  # made anew at each look
        self.block = _first_block(points, layers)
        self.early = _UNEMBED in points and _bare(points, "unembed")
        self.tap = AttentionTap()
        self._entries = noise._hooks(model, sites, self.factors, self.tap)
        if noise.rows != "all":
            self._entries = [(name, self._keeping_clean(fn)) for name, fn in self._entries]
        self._caught: Tensor | None = None
        self._ending = self._spreading = False
        self._copies = 1

    def hooks(self) -> HookList:
        """Everything that the sweep puts on the model, once."""
        entries = list(self._entries)
        if self.block:
            entries.insert(0, (self.block, paused_in_checks(self._spread, "sweep")))
        if self.early:
            entries.append((_UNEMBED, paused_in_checks(self._end, "sweep")))
        return entries

    def _keeping_clean(self, hook_fn: Callable[..., Any]) -> Callable[..., Any]:
        """This hook, with the clean rows left as they come, to the last bit."""

        def edit(tensor: Tensor, hook: Any) -> Any:
            out, clean = hook_fn(tensor, hook), self.factors.clean_rows()
            if out is not None and clean is not None:
                out[clean] = tensor[clean]
            return out

        return edit

    def _spread(self, residual: Tensor, hook: Any) -> Tensor | None:
        if not self._spreading:
            return None
        return residual.repeat(self._copies, *[1] * (residual.ndim - 1))

    def _end(self, hidden: Tensor, hook: Any) -> None:
        if self._ending:
            self._caught = hidden
            raise Finished

    # -- what works on this model -----------------------------------------------------------

    def try_on(self, example: ModelInput) -> None:
        """Try on a short prompt whether a pass may end early, and begin with one row."""
        if self.early:
            self.early = self._unembedding_is_last(example.rows([0, 0]))
        if self.block:
            some = range(min(3, len(self.factors.grid)))
            whole = self.run(example, (0,), some)
            try:
                self._spreading = True
                spread = self.run(example, (0,), some)
            except (RuntimeError, ValueError, TypeError, IndexError):
                self.block = ""  # a block that is also given something else for each row
                return
            finally:
                self._spreading = False
            within = torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
            if spread.shape != whole.shape or not float((spread - whole).abs().max()) <= within:
                self.block = ""

    def _unembedding_is_last(self, example: ModelInput) -> bool:
        """Whether logits are ``model.unembed`` of its input, also where they are large."""
        self.factors.enter((0,), range(example.batch), self.device)
        hidden = self._until_unembedding(example)
        if hidden is None:
            return False
        logits = self._unembedded(hidden)
        if not isinstance(logits, Tensor):
            return False
        hidden = hidden * (_LARGE / logits.abs().max().clamp_min(1e-9)).to(hidden.dtype)
        expected = self._unembedded(hidden)

        def enlarge(_: Tensor, hook: Any) -> Tensor:
            return hidden

        self.tap.reset()
        seen = run_with(self.model, example, [(_UNEMBED, enlarge)])
        if not isinstance(seen, Tensor) or seen.shape != expected.shape:
            return False
        within = 16 * torch.finfo(expected.dtype).eps * _LARGE
        return float((seen - expected).abs().max()) <= within

    def _until_unembedding(self, given: ModelInput) -> Tensor | None:
        self._caught, self._ending = None, True
        try:
            self._call(given)
        finally:
            self._ending = False
        caught, self._caught = self._caught, None
        return caught

    def _call(self, given: ModelInput) -> Any:
        self.tap.reset()  # one that was only tried may have been aborted
        return run_with(self.model, given, ())

    def _unembedded(self, states: Tensor) -> Tensor:
        with model_pass():
            out: Tensor = self.model.unembed(states)  # type: ignore[attr-defined]
        return out

    # -- passes -----------------------------------------------------------------------------

    def head(self, states: Tensor) -> Tensor:
        """Logits of what :meth:`run` gives, at some positions."""
        return self._unembedded(states) if self.early else states

    def run(self, given: ModelInput, prompts: Sequence[int], conditions: range) -> Tensor:
        """One pass of prompts, given once each: ``[row, pos, d]``, or the logits themselves."""
        self.factors.enter(prompts, conditions, self.device)
        n = len(conditions)
        self._copies = n
        if not self._spreading:
            given = given.rows([i for i in range(given.batch) for _ in range(n)])
        states = self._until_unembedding(given) if self.early else self._call(given)
        return checked_logits(states)

    @contextlib.contextmanager
    def spreading(self, wanted: bool) -> Iterator[None]:
        """Inside, passes begin with one clean row, if that is wanted and works."""
        self._spreading = wanted and bool(self.block)
        try:
            yield
        finally:
            self._spreading = False


def _first_block(points: Mapping[str, Any], layers: Sequence[LayerSites]) -> str:
    """Hook at the input of the first noised block, where clean blocks precede it."""
    block = layers[0].block
    name = f"{block}.hook_resid_pre"
    if not block.startswith("blocks.") or block == "blocks.0" or name not in points:
        return ""
    return name if _bare(points, "") else ""  # hooks of the user's see whole passes


def _bare(points: Mapping[str, Any], prefix: str) -> bool:
    """Whether only our hooks are on these points."""
    mine = (point for name, point in points.items() if name.startswith(prefix))
    return not any(standing_hooks(point) for point in mine)
