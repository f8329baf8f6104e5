"""What is measured: a table for each part."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import Amount, Part, Reading, Size, Subject, reading

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from hooks.sites import LayerView

AMOUNT: Final = core.by_size(Amount(64, 1, 64), Amount(1_000, 4), Amount(10_000, 8))
BINS: Final = 100
KINDS: Final = ("content", "sink")
MAP_HEADS: Final = 2
MAP_TOKENS: Final = 32


def measure(subject: Subject, amount: Amount, maps: int) -> pd.DataFrame:
    """Row maxima of every head, the first row of each prompt left out, and a few heads' maps."""
    import hooks
    from hooks.model import encode
    from hooks.sites import observe

    model, read = subject.load(), reading(subject, amount)
    sites = hooks.attention_sites(model).layers
    counted = _Maxima([s.n_heads for s in sites])
    observe(model, sites, encode(model, read.ids), counted.add, batch_size=64)
    heads = pd.DataFrame(
        [
            {"what": "head", "layer": s.layer, "head": h, "label": f"{s.label}H{h}", **row}
            for i, s in enumerate(sites)
            for h in range(s.n_heads)
            for row in counted.of_head(i, h)
        ]
    )
    chosen = _most_sparse(heads, maps)
    frames = [counted.histogram(), heads, _maps(model, sites, read, chosen)]
    rows = pd.concat([f for f in frames if len(f)], ignore_index=True)
    return core.about(subject, rows, "what", "kind")


class _Maxima:
    """Histogram of row maxima by kind of row, and counts by head."""

    def __init__(self, heads: list[int]) -> None:
        self.bins = np.zeros((len(KINDS), BINS), dtype=np.int64)
        # rows, sparse, non-sparse: [kind, head, 3]
        self.counts = [np.zeros((len(KINDS), n, 3), dtype=np.int64) for n in heads]

    def add(self, view: LayerView) -> None:
        """One layer of one batch; a row with one visible key has no choice and is left out."""
        from hooks import NON_SPARSE, SPARSE

        best, at = view.pattern.max(-1)
        rows = view.visible.sum(-1) >= 2
        for kind, chosen in enumerate((rows & (at != 0), rows & (at == 0))):
            self.bins[kind] += _binned(best[chosen])
            for i, mask in enumerate((chosen, best >= SPARSE, best < NON_SPARSE)):
                self.counts[view.index][kind, :, i] += (chosen & mask).sum((0, 2)).cpu().numpy()

    def histogram(self) -> pd.DataFrame:
        """One row per kind and bin."""
        return pd.DataFrame(
            [
                {"what": "histogram", "kind": kind, "low": b / BINS, "rows": int(self.bins[k, b])}
                for k, kind in enumerate(KINDS)
                for b in range(BINS)
            ]
        )

    def of_head(self, index: int, head: int) -> list[dict[str, Any]]:
        """One row per kind."""
        names = ("rows", "sparse", "non_sparse")
        return [
            {"kind": kind, **dict(zip(names, self.counts[index][k, head].tolist(), strict=True))}
            for k, kind in enumerate(KINDS)
        ]


def _binned(values: torch.Tensor) -> np.ndarray:
    """Counts in equal bins over [0, 1], a maximum of 1 in the last."""
    at = (values.double() * BINS).floor().clamp(0, BINS - 1).long().cpu().numpy()
    return np.bincount(at, minlength=BINS)


def _most_sparse(heads: pd.DataFrame, n: int) -> list[tuple[int, int]]:
    """(layer, head) of those with the largest share of sparse rows that attend to content."""
    total = heads.groupby(["layer", "head"])["rows"].sum()
    content = heads[heads["kind"] == "content"].set_index(["layer", "head"])["sparse"]
    order = (content / total).sort_values(ascending=False, kind="stable")
    return [(int(layer), int(head)) for layer, head in order.index[:n]]


def _maps(
    model: TransformerBridge, sites: Any, read: Reading, chosen: list[tuple[int, int]]
) -> pd.DataFrame:
    """Attention of the chosen heads in the first prompt, its first tokens."""
    from hooks.model import encode
    from hooks.sites import observe

    prompts = encode(model, [read.ids[0][:MAP_TOKENS]])
    tokens = [repr(token) for token in prompts.strings[0]]  # quoted: a CSV knows them as text
    rows: list[dict[str, Any]] = []

    def show(view: LayerView) -> None:
        for rank, (layer, head) in enumerate(chosen):
            if layer != view.sites.layer:
                continue
            pattern, seen = view.pattern[0, head].cpu(), view.visible[0, head].cpu()
            of = {"what": "map", "kind": "", "layer": layer, "head": head}
            of |= {"label": f"{view.sites.label}H{head}", "rank": rank}
            rows.extend(
                {
                    **of,
                    "query": query,
                    "key": key,
                    "query_token": tokens[query],
                    "key_token": tokens[key],
                    "weight": round(float(pattern[query, key]), 4),
                }
                for query, key in seen.nonzero().tolist()
            )

    watched = [s for s in sites if any(s.layer == layer for layer, _ in chosen)]
    if watched:
        observe(model, watched, prompts, show)
    return pd.DataFrame(rows)


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model; the first of each group shows attention maps."""
    amount, out, seen = AMOUNT[size], [], set()
    for s in subjects:
        maps = 0 if s.group in seen else MAP_HEADS
        seen.add(s.group)
        settings = {**amount.settings(s), "maps": maps}
        out.append(Part(s.name, partial(measure, s, amount, maps), s, settings))
    return out
