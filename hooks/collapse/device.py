"""Layers reduced on the device where their scores lie; what they give is added to the tally."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.collapse.reduce import LayerReducer, Workers
from hooks.collapse.settings import ProbeSettings
from hooks.collapse.showing import Held
from hooks.collapse.table import RowTable
from hooks.collapse.tally import Tally
from hooks.kernels import ABLE, BROKEN, MASKED, Rule
from hooks.kernels.engines import (
    SUMS,
    FragileRows,
    LayerSums,
    Listed,
    Slots,
    TorchPass,
    computes,
    fastest,
    from_number,
    operands,
    pass_of,
)
from hooks.model import Fused
from hooks.noise import NormNoise
from hooks.sites import LayerSites, SeenLayer


def lacks(settings: ProbeSettings, rule: Rule) -> str | None:
    """What the engine of a device does not compute of what is asked; None: it computes all."""
    if settings.draws or settings.method == "sample":
        return "draws"
    if settings.strict == "computed" and not computes(rule):
        return (
            "the strict rate under other laws than uniform, of noise on q alone, or under a soft "
            "cap (strict=False leaves it out)"
        )
    return None


class Engines:
    """What reduces layers: compiled code, or torch on the scores' own device.

    Args:
        tally: where sums go.
        noise: the probe's.
        asked: the engine that was asked for.
        workers: of the compiled code.
        fixed: whether sizes are fixed beforehand, not read; default: where reading them waits for
            a device.
    """

    def __init__(
        self,
        tally: Tally,
        noise: NormNoise,
        asked: str,
        workers: Workers,
        fixed: bool | None = None,
    ) -> None:
        self.tally, self.noise, self.asked, self.workers = tally, noise, asked, workers
        self.ran: set[str] = set()
        self._fixed = fixed
        self._slots: dict[bool, Slots] = {}
        self._chosen: dict[torch.device, str] = {}

    @property
    def name(self) -> str:
        """Which engines ran."""
        return ", ".join(sorted(self.ran))

    def on(self, device: torch.device) -> str:
        """Which engine reduces scores where they lie."""
        if self.asked != "auto":
            return self.asked
        if device not in self._chosen:
            self._chosen[device] = fastest(device)
        return self._chosen[device]

    def slots(self, device: torch.device) -> Slots:
        """How many places work has on this kind of device; remembered from pass to pass."""
        fixed = device.type != "cpu" if self._fixed is None else self._fixed
        return self._slots.setdefault(fixed, Slots(fixed))

    def each_layer(
        self,
        prompts: Sequence[int],
        watch: Callable[[Callable[[SeenLayer], None]], None],
        reduce: Callable[[SeenLayer, DeviceReducer], None],
    ) -> None:
        """Reduce the layers of one pass, which ``watch`` shows, again if there were too few places.

        Args:
            prompts: of the batch.
            watch: runs the pass and shows its layers.
            reduce: hands a layer's scores to its reducer.
        """
        done: set[int] = set()

        def succeeds() -> bool:
            passing = _Pass(self, prompts, done)
            watch(lambda seen: reduce(seen, passing.reducer(seen)))
            return passing.finish()

        while not succeeds():
            pass


class _Pass:
    """One forward pass; layers in ``done`` were reduced by compiled code in an earlier one."""

    def __init__(self, engines: Engines, prompts: Sequence[int], done: set[int]) -> None:
        self.engines, self.prompts, self.done = engines, prompts, done
        self.compiled: set[int] = set()
        self.passes: dict[tuple[bool, str], TorchPass] = {}
        self.reducers: dict[int, DeviceReducer] = {}

    def reducer(self, seen: SeenLayer) -> DeviceReducer:
        """The reducer of a layer."""
        mine = self.reducers.get(seen.index)
        if mine is None:
            mine = self.reducers[seen.index] = DeviceReducer(seen.index, seen.sites, self)
        return mine

    def on(self, device: torch.device) -> TorchPass:
        """Where layers of this kind of device are reduced."""
        slots, tally = self.engines.slots(device), self.engines.tally
        key = slots.fixed, self.engines.on(device)
        if key not in self.passes:
            settings = tally.settings
            self.passes[key] = pass_of(key[1])(
                slots,
                keep=settings.keep,
                keep_rows=settings.keep_rows,
                cutoff=tally.parts.cutoff,
                strict=settings.strict == "computed",
            )
        return self.passes[key]

    def finish(self) -> bool:
        """Add what the pass found to the tally; False where it must be made again."""
        self.done |= self.compiled
        found = [passing.finish() for passing in self.passes.values()]
        if any(x is None for x in found):
            return False
        for brought in found:
            assert brought is not None
            for index, sums in brought.layers.items():
                self.reducers[index].add_sums(sums)
            tally = self.engines.tally
            for listed, cutoff in brought.listed:
                tally.parts.add(_table(listed, cutoff, tally, self.prompts))
            for rows in brought.fragile:
                tally.showing.hold(list(_held(rows, tally, self)))
        return True


class DeviceReducer(LayerReducer):
    """Adds one layer of one batch to a pass, whose sums stay where the scores are."""

    def __init__(self, index: int, sites: LayerSites, passing: _Pass) -> None:
        engines = passing.engines
        super().__init__(
            engines.tally, index, sites, engines.noise, passing.prompts, engines.workers
        )
        self.passing = passing
        self.eps = 0.0
        self.has_qk = False

    def add(
        self,
        scores: Float[Tensor, "batch head query key"],
        pattern: Float[Tensor, "batch head query key"] | None,
        s: Float[Tensor, "batch head query key"] | None,
        **block: Any,
    ) -> None:
        """As :meth:`LayerReducer.add`."""
        engines, eps = self.passing.engines, block.get("eps")
        self.eps = torch.finfo(scores.dtype).eps if eps is None else eps
        n_key = block.get("n_key") or scores.shape[3]
        rule = self._rule(block.get("first_query", 0), self.eps, n_key)
        if self._by_compiled_code(scores.device, rule):
            if self.index not in self.passing.done:
                super().add(scores, pattern, s, **block)
            return
        engines.ran.add(engines.on(scores.device))
        self.has_qk = s is not None
        weights, parts = (None if x is None else x.detach().flatten(0, 1) for x in (pattern, s))
        on, rows = self.passing.on(scores.device), scores.detach().flatten(0, 1)
        on.add(self.index, rule, rows, weights, parts, self.passing.prompts)

    def add_fused(
        self, fused: Fused, query_block: int | None, room: int, lengths: Tensor | None = None
    ) -> None:
        """As :meth:`LayerReducer.add_fused`, where :meth:`takes` allows it.

        Args:
            lengths: queries of each prompt; later ones are padding.
        """
        device = fused.query.device
        if not pass_of(self.passing.engines.on(device)).fuses:
            if self.index not in self.passing.done:
                super().add_fused(fused, query_block, room)
            return
        self.passing.engines.ran.add("triton")
        self.eps = torch.finfo(fused.query.dtype).eps
        self.has_qk = self.sites.has_bias
        on = self.passing.on(device)
        q, k = fused.query.detach(), fused.key.detach()
        of = operands(
            q, k, fused.attn_mask, causal=fused.is_causal, scale=fused.scale, lengths=lengths
        )
        rule = self._rule(0, self.eps, fused.shape[3])
        on.add_fused(self.index, rule, of, self.passing.prompts, biased=self.sites.has_bias)

    def takes(self, fused: Fused, *, padded: bool) -> bool:
        """Whether this engine makes these scores itself, a piece at a time.

        Args:
            padded: whether prompts have different lengths.
        """
        device, rule = fused.query.device, self._rule(0, 0.0, fused.shape[3])
        if not pass_of(self.passing.engines.on(device)).fuses:
            if device.type != "cpu" or padded or self.sites.has_bias:
                return False
            return self._by_compiled_code(device, rule)
        if lacks(self.settings, rule) or fused.query.dtype == torch.float64:
            return False  # rows decide
        return rule.soft_cap == 0.0 and (fused.scale is None or fused.scale > 0)

    def _by_compiled_code(self, device: torch.device, rule: Rule) -> bool:
        """Whether this engine was asked for, or is the only one that can."""
        engines, lacking = self.passing.engines, lacks(self.settings, rule)
        if engines.asked in ("torch", "triton") and lacking:
            wanted = f"wanted 'compiled' or 'auto' for {lacking}"
            raise ValueError(f"engine: {wanted}; got {engines.asked!r}")
        here = engines.asked == "auto" and device.type == "cpu"
        if not (engines.asked == "compiled" or here or lacking):
            return False
        engines.ran.add("compiled")
        self.passing.compiled.add(self.index)
        return True

    def add_sums(self, found: LayerSums) -> None:
        """Add what a pass brought of this layer to the tally."""
        batch, n_sigmas = len(self.prompts), len(self.settings.sigmas)
        counts = found.counts.numpy().copy()
        self._refuse_broken(counts[BROKEN].reshape(batch, -1))
        counts[ABLE : ABLE + 2] = found.able.view(-1, 2).T.numpy()
        sums = found.sums.double().view(len(found.sums), n_sigmas, -1, 2).numpy()
        given = self._sums(counts.shape[1])._replace(
            counts=counts,
            rows=found.rows.view(-1, 2).numpy(),
            level=found.level.double().view(-1, 2).numpy(),
            **dict(zip(SUMS, sums, strict=True)),
        )
        self._take(given, batch)


def _table(listed: Listed, cutoff: float, tally: Tally, prompts: Sequence[int]) -> RowTable:
    """Entries in no order as rows with their competitors, nearest first."""
    columns = [x.numpy() for x in listed]
    near = columns[3] < np.float32(cutoff)
    order = np.lexsort([columns[2][near], columns[3][near], columns[0][near]])
    number, key, place, a, s, beta, s_star = (x[near][order] for x in columns)
    start = np.flatnonzero(np.diff(number, prepend=-1))
    layer, matrix, query = from_number(number[start])
    heads = np.array([sites.n_heads for sites in tally.layers])[layer]
    named = {
        "layer": layer,
        "head": matrix % heads,
        "prompt": np.asarray(prompts)[matrix // heads],
        "query": query,
        "key": key[start],
        "rival": place[start],
    }
    return RowTable(
        **{name: values.astype(np.int32) for name, values in named.items()},
        s_star=s_star[start],
        start=np.append(start, len(number)).astype(np.int64),
        s=s,
        beta=beta if tally.biased else beta[:0],
        a=a,
        cutoff=np.asarray(cutoff, np.float32),
    )


def _held(rows: FragileRows, tally: Tally, passing: _Pass) -> Iterator[Held]:
    """Rows as they are kept to be shown."""
    columns = [x.numpy() for x in rows]
    places = np.stack(from_number(columns[2]), 1).tolist()
    for a, at, key, rival, scores, qk in zip(columns[0], places, *columns[3:], strict=True):
        if not a < 1:
            continue
        layer, matrix, query = at
        mine, heads = passing.reducers[layer], tally.layers[layer].n_heads
        prompt = int(mine.prompts[matrix // heads])
        seen = int(np.flatnonzero(scores > MASKED)[-1]) + 1
        yield Held(
            order=(float(a), layer, matrix % heads, prompt, query),
            key=int(key),
            rival=int(rival),
            scores=scores[:seen].astype(np.float64),
            qk=qk[:seen].astype(np.float64) if mine.has_qk else None,
            eps=mine.eps,
        )
