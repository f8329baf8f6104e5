"""CacheRecipe: which format each layer's keys and values are stored in, under a budget of bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from hooks.arguments import brief, check_booleans, check_choice, check_number, check_path
from hooks.measures.cache.exports import ENGINES, LayerFormats
from hooks.measures.cache.formats import ROLES, CacheFormat, Full, read_format
from hooks.reports import write_whole

Option = tuple[Fraction, float]  # what it costs, what it loses


@dataclass(frozen=True)
class CacheRecipe:
    """A format for each layer's keys and for its values.

    Attributes:
        model: the model's name.
        layers: block indices.
        keys, values: the formats' names, layer by layer.
        bits: bits per stored number, scales included.
        risk: predicted KL(clean || cached), nats per token; the sum of the layers' risks.
        budget: the bits that were allowed.
        attentions: the model's attention layers, in full precision where they have no format; empty
            for a model with an encoder, whose caches engines number otherwise; None: those named.
        widths: channels of each layer's keys and values, where they are known.
    """

    model: str
    layers: tuple[int, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    bits: float
    risk: float
    budget: float
    attentions: tuple[int, ...] | None = None
    widths: tuple[tuple[int, int], ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """One row per layer: layer, keys, values."""
        columns = {"layer": self.layers, "keys": self.keys, "values": self.values}
        return pd.DataFrame({name: list(column) for name, column in columns.items()})

    def formats(self) -> tuple[tuple[CacheFormat, CacheFormat], ...]:
        """Each layer's formats of keys and of values."""
        pairs = zip(self.keys, self.values, strict=True)
        return tuple((read_format(k), read_format(v)) for k, v in pairs)

    def layer_lists(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """The layers of each pair of formats (keys, values), the commonest first."""
        pairs = list(zip(self.keys, self.values, strict=True))
        ranked = sorted(set(pairs), key=lambda pair: (-pairs.count(pair), pairs.index(pair)))
        return {
            pair: tuple(i for i, own in zip(self.layers, pairs, strict=True) if own == pair)
            for pair in ranked
        }

    def export(self, engine: str) -> str:
        """The recipe as arguments, or a file, of an engine.

        Args:
            engine: ``"vllm"``: ``--kv-cache-dtype`` and ``--kv-cache-dtype-skip-layers``, for one
                float8 format beside ``"full"``, keys and values together. ``"llama.cpp"``: ``-ctk``
                and ``-ctv``, one type each for all layers. ``"ik_llama.cpp"``: ``-ctk-first`` and
                its kin, for runs of layers at the two ends. ``"kvtuner"``: its YAML, which has
                numbers of bits alone. Others (TensorRT-LLM, ModelOpt) take lists of layers:
                :meth:`layer_lists`. Layers without a format are in full precision.

        Raises:
            ValueError: an unknown engine, or formats that it does not have by layer; names them. A
                model with an encoder.
        """
        check_choice("engine", engine, ENGINES)
        named = dict(zip(self.layers, self.formats(), strict=True))
        widths = dict(zip(self.layers, self.widths, strict=False))
        return ENGINES[engine](
            [
                LayerFormats(layer, *named.get(layer, (Full(), Full())), widths.get(layer))
                for layer in self._attentions()
            ]
        )

    def _attentions(self) -> tuple[int, ...]:
        if self.attentions == ():
            raise ValueError(
                "recipe: wanted a model of one stack, whose layers a cache numbers as we do; got "
                f"one with an encoder or cross-attention, {self.model}"
            )
        return self.layers if self.attentions is None else self.attentions

    def cache(self) -> Any:
        """A cache for transformers' ``generate(past_key_values=...)``, in these formats.

        It gives back what they store, to the bit, and saves no memory itself.

        Raises:
            ValueError: a model with an encoder.
        """
        self._attentions()
        from hooks.measures.cache.mixed import MixedCache  # transformers takes long to import

        return MixedCache(dict(zip(self.layers, self.formats(), strict=True)))

    def save(self, path: str | Path) -> Path:
        """Write it as JSON; returns its path.

        Raises:
            OSError: it can't be written.
        """
        text = json.dumps(vars(self), indent=1) + "\n"
        return write_whole(check_path("path", path), [text.encode()])

    @classmethod
    def load(cls, path: str | Path) -> CacheRecipe:
        """Read what ``save`` wrote.

        Raises:
            ValueError: it is no recipe.
            OSError: no such file.
        """
        path = check_path("path", path)
        try:
            found = json.loads(path.read_text("utf-8"))
            lists = ("layers", "keys", "values", "attentions", "widths")
            fields: Any = {
                n: tuple(tuple(y) if isinstance(y, list) else y for y in x)
                if n in lists and x is not None
                else x
                for n, x in found.items()
            }
            recipe = cls(**fields)
            _check(recipe)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"path: wanted a recipe; got {path}: {error}") from error
        return recipe

    def __str__(self) -> str:
        said = "; ".join(
            f"{keys} / {values}: {', '.join(map(str, layers))}"
            for (keys, values), layers in self.layer_lists().items()
        )
        return (
            f"{self.model}: {self.bits:.3g} bits per number (of {self.budget:.3g}), predicted KL "
            f"{self.risk:.2g} nats per token. Keys / values by layer: {said}."
        )


def _check(recipe: CacheRecipe) -> None:
    """Refuse what ``save`` can't have written."""
    if not len(recipe.layers) == len(recipe.keys) == len(recipe.formats()):
        raise ValueError("not a format for each layer's keys and values")
    whole = (
        *recipe.layers,
        *(recipe.attentions or ()),
        *(d for pair in recipe.widths for d in pair),
    )
    if len(set(recipe.layers)) < len(recipe.layers) or not all(type(i) is int for i in whole):
        raise ValueError(f"layers that are no block indices, each once: {brief(recipe.layers)}")
    for number in (recipe.bits, recipe.risk, recipe.budget):
        if not isinstance(number, int | float):
            raise ValueError(f"wanted numbers of bits and nats; got {brief(number)}")


# -- the choice -------------------------------------------------------------------------------


def best_recipe(report: Any, names: tuple[str, ...], bits: float, together: bool) -> CacheRecipe:
    """See :meth:`CacheRisk.recipe`."""
    bits = check_number("bits", bits, "a number above 0", lambda x: 0 < x < np.inf)
    (together,) = check_booleans(together=together)
    model, frame = report.model, report.to_frame("layer")
    attentions = model.get("attentions")
    items: list[dict[str, Option]] = []
    stored = 0
    for i, (layer, heads) in enumerate(zip(report.settings.layers, model["kv_heads"], strict=True)):
        mine = frame[frame["layer"] == layer].set_index("format")
        of: list[dict[str, Option]] = []
        for role, width in zip(ROLES, (model["d_key"][i], model["d_value"][i]), strict=True):
            n = heads * width
            stored += n
            bits_of = {name: Fraction(read_format(name).bits(role, width)) for name in names}
            risk = {"full": 0.0, **dict(mine[f"risk_{role}"])}
            bear = [name for name in names if np.isfinite(risk[name])]  # not what overflows
            of.append({name: (n * bits_of[name], float(risk[name])) for name in bear})
        if together:
            both = [name for name in names if all(name in part for part in of)]
            of = [{name: _plus(*(part[name] for part in of)) for name in both}]
        if not all(of):
            wanted = f"one that does not overflow in layer {layer}"
            raise ValueError(f"formats: wanted {wanted}; got {', '.join(names)}")
        items += of
    chosen = choose(items, Fraction(bits) * stored)
    if chosen is None:
        least = float(sum(min(c for c, _ in item.values()) for item in items) / stored)
        raise ValueError(f"bits: wanted {least:.4g} or more, for these formats; got {bits:g}")
    taken = [item[name] for item, name in zip(items, chosen, strict=True)]
    keys, values = (chosen, chosen) if together else (chosen[::2], chosen[1::2])
    return CacheRecipe(
        model=model["name"],
        layers=tuple(report.settings.layers),
        keys=tuple(keys),
        values=tuple(values),
        bits=float(sum(cost for cost, _ in taken) / stored),
        risk=sum(risk for _, risk in taken),
        budget=bits,
        attentions=None if attentions is None else tuple(attentions),
        widths=tuple(zip(model["d_key"], model["d_value"], strict=True)),
    )


def _plus(one: Option, other: Option) -> Option:
    return one[0] + other[0], one[1] + other[1]


def choose(items: Sequence[Mapping[str, Option]], budget: Fraction) -> list[str] | None:
    """One option of each item, their costs at most the budget, with the least sum of losses.

    Exact: item by item, every sum of costs is kept that no cheaper one beats. None if nothing fits.

    Args:
        items: (cost, loss) of each option, by its name.
        budget: most that the costs may add up to.
    """
    scale = np.lcm.reduce([c.denominator for item in items for c, _ in item.values()])
    most = int(budget * int(scale) // 1)
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[list[str], Int[np.ndarray, "kept"], Int[np.ndarray, "kept"]]] = []
    left = [int(min(c for c, _ in item.values()) * int(scale)) for item in items]
    for i, item in enumerate(items):
        names = list(item)
        costs = np.array([int(item[n][0] * int(scale)) for n in names], np.int64)
        losses = np.array([item[n][1] for n in names])
        sums, total = (costs[:, None] + cost).ravel(), (losses[:, None] + loss).ravel()
        kept = _undominated(sums, total, most - sum(left[i + 1 :]))
        if not len(kept):
            return None
        steps.append((names, kept // len(cost), kept % len(cost)))
        cost, loss = sums[kept], total[kept]
    at, out = int(loss.argmin()), []
    for names, option, before in reversed(steps):
        out.append(names[option[at]])
        at = int(before[at])
    return out[::-1]


def _undominated(
    cost: Int[np.ndarray, "n"], loss: Float[np.ndarray, "n"], most: int
) -> Int[np.ndarray, "kept"]:
    """Those within the budget that lose less than all cheaper ones."""
    order = np.lexsort((loss, cost))
    order = order[cost[order] <= most]
    best = np.minimum.accumulate(np.r_[np.inf, loss[order]])[:-1] if len(order) else loss[:0]
    kept: np.ndarray = order[loss[order] < best]
    return kept
