"""What is measured: a table for each part."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch

from qkvnorm_lens.experiments import core
from qkvnorm_lens.experiments.core import Amount, Part, Size, Subject, reading, traits

if TYPE_CHECKING:
    from hooks import LayerView

AMOUNT: Final = core.by_size(Amount(16, 1, 32), Amount(64, 2), Amount(256, 16))
OUTPUTS: Final = core.by_size(1, 1, 4)
"""Prompts whose output is compared: each layer takes whole passes of them."""
OUTLIERS: Final = 3
BATCH: Final = {"addition": 64, "language": 4}
WHOLE: Final = -1

Frozen = dict[str, Any]
FROZEN: Final[dict[str, Frozen]] = {
    "all": {},
    "all, first token spared": {"spare_first": True},
    "outlier dimensions": {"part": "outliers", "outliers": OUTLIERS},
    "all other dimensions": {"part": "rest", "outliers": OUTLIERS},
}
"""What is frozen of a token's length, and how `hooks.interference` is told."""
_COUNTS: Final = ["rows", "sinks", "moved", "moved_content", "moved_sinks", "to_first"]
_OUTPUT: Final = ["kl", "agree"]
FACTS: Final = (
    "dimensions", "first_share", "share", "first_length", "spread", "longest", "longest_length",
    "winner", "winner_share", "winner_length",
)  # fmt: skip


def measure(
    subject: Subject, amount: Amount, outputs: int, *, few_layers: bool = False
) -> pd.DataFrame:
    """What moves, by what is frozen and layer; and how the lengths are made, by layer.

    Args:
        subject: the model.
        amount: what it reads.
        outputs: how many prompts' output is compared.
        few_layers: only the first, the middle and the last layer with a norm.
    """
    import hooks

    model, ids = subject.load(), reading(subject, amount).ids
    before = traits.norm_before(model, ids)
    if not before:
        row = dict.fromkeys((*_COUNTS, *_OUTPUT), math.nan) | {"frozen": "-", "layer": WHOLE}
        return core.about(subject, pd.DataFrame([row]).assign(reason="no norm before attention"))
    if few_layers:
        every = [*before]
        before = {n: before[n] for n in sorted({every[0], every[len(every) // 2], every[-1]})}
    options: dict[str, Any] = {"layers": list(before), "draws": 0, "progress": False}
    options["batch_size"] = BATCH[subject.kind]
    frames = []
    for frozen, how in FROZEN.items():
        moved = hooks.interference(model, ids, on="k", **how, **options)
        after = hooks.interference(model, ids[:outputs], on="qk", output=True, **how, **options)
        whole = moved.to_frame("model")[_COUNTS].assign(layer=WHOLE, label="all")
        layers = moved.to_frame("layer")[["layer", "label", *_COUNTS]]
        output = after.to_frame("layer")[["layer", *_OUTPUT]]
        both = pd.concat([layers.merge(output, on="layer", validate="1:1"), whole])
        frames.append(both.assign(frozen=frozen))
    known = lengths(model, ids, before)
    table = pd.concat(frames, ignore_index=True).merge(known, on="layer", how="left")
    first = ["frozen", "layer", "label"]
    columns = [*first, *(c for c in table.columns if c not in first)]
    return core.about(subject, table[columns].assign(reason="-"))


def lengths(model: Any, ids: Sequence[Sequence[int]], before: dict[int, str]) -> pd.DataFrame:
    """By layer, over all prompts: what the lengths of the norm's inputs are made of, and who wins.

    Columns:
        dimensions: the outlier dimensions, those with the largest mean square over all tokens but
            the first.
        first_share, share: of the squared length, what these make: of first tokens (mean), of the
            others (median).
        first_length: of first tokens, over the median of the others (mean).
        spread: deviation over mean of the others' lengths.
        longest, longest_length: the longest of the others, and its length over their median.
        winner: the token that most content rows move to, where each key is multiplied by its
            length, and the first token spared; `winner_share` of those that move, `winner_length`
            over the median.
    """
    import hooks
    from hooks.model import encode
    from hooks.sites import observe

    chosen = [s for s in hooks.attention_sites(model) if s.layer in before]
    prompts = encode(model, [list(row) for row in ids])
    squares: dict[int, dict[int, torch.Tensor]] = {s.layer: {} for s in chosen}  # by prompt
    won: dict[int, list[tuple[str, float]]] = {s.layer: [] for s in chosen}

    def look(view: LayerView) -> None:
        assert view.stream is not None
        x = view.stream.double()
        x = x - x.mean(-1, keepdim=True) if before[view.sites.layer] == "LayerNorm" else x
        each = x.square().float().cpu()
        squares[view.sites.layer] |= dict(zip(view.prompts, each, strict=True))
        size = x.square().mean(-1).sqrt()
        factor = size / size[:, 1:].quantile(0.5, dim=1, keepdim=True)
        ratio = factor.clone()
        factor[:, 0] = 1.0
        star = view.scores.masked_fill(~view.visible, -math.inf).argmax(-1)
        content = (view.pattern.amax(-1) >= hooks.SPARSE) & (star > 0)
        scores = view.parts.s * factor[:, None, None].to(view.parts.s)
        top = scores.masked_fill(~view.visible, -math.inf).argmax(-1)
        for batch, head, query in (content & (top != star)).nonzero().tolist():
            key = int(top[batch, head, query])
            word = prompts.strings[view.prompts[batch]][key]
            won[view.sites.layer].append((word, float(ratio[batch, key])))

    observe(model, chosen, prompts, look, stream=True, vectors=("q", "k"))
    return pd.DataFrame(
        [
            {
                "layer": n,
                **_made_of([mine[i] for i in sorted(mine)], prompts.strings),
                **_winner(won[n]),
            }
            for n, mine in squares.items()
        ]
    )


def _made_of(squares: list[torch.Tensor], words: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Of one layer, from the squared entries ``[pos, d]`` of each prompt."""
    others = torch.cat([x[1:] for x in squares])
    first = torch.stack([x[0] for x in squares])
    outliers = others.mean(0).topk(min(OUTLIERS, others.shape[1])).indices
    size, of_first = (x.mean(-1).sqrt() for x in (others, first))
    middle = float(size.median())
    at = int(size.argmax())
    names = [word for row, x in zip(words, squares, strict=True) for word in row[1 : len(x)]]
    return {
        "dimensions": " ".join(map(str, outliers.tolist())),
        "first_share": float((first[:, outliers].sum(1) / first.sum(1)).mean()),
        "share": float((others[:, outliers].sum(1) / others.sum(1)).median()),
        "first_length": float(of_first.mean()) / middle,
        "spread": float(size.std(correction=0) / size.mean()),
        "longest": repr(names[at]),
        "longest_length": float(size[at]) / middle,
    }


def _winner(won: list[tuple[str, float]]) -> dict[str, Any]:
    if not won:
        return {"winner": "-", "winner_share": math.nan, "winner_length": math.nan}
    (word, count), *_ = Counter(word for word, _ in won).most_common(1)
    mine = [size for each, size in won if each == word]
    return {
        "winner": repr(word),
        "winner_share": count / len(won),
        "winner_length": float(np.median(mine)),
    }


def parts(subjects: tuple[Subject, ...], size: Size) -> list[Part]:
    """One for each model."""
    amount, outputs, out = AMOUNT[size], OUTPUTS[size], []
    for s in subjects:
        few = size == "smoke" and s.kind == "language"  # each takes whole passes
        work = partial(measure, s, amount, outputs, few_layers=few)
        settings = {
            "outliers": OUTLIERS,
            "outputs": outputs,
            **({"few_layers": True} if few else {}),
        }
        out.append(Part(s.name, work, s, {**amount.settings(s), **settings}))
    return out


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the models that have such a norm."""
    return table[table["reason"] == "-"]


def of(table: pd.DataFrame, frozen: str, *, layers: bool = False) -> pd.DataFrame:
    """What moves with this frozen, of whole models or by layer."""
    mine = table[(table["frozen"] == frozen) & ((table["layer"] != WHOLE) == layers)]
    return mine.sort_values(["model", "layer"], kind="stable")
