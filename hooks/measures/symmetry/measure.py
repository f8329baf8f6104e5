"""Permutation symmetry: what the order of the earlier tokens does to the last one's prediction.

Attention sums over a set. Without positions and without a causal mask, the last token's prediction
does not depend on the order of the tokens before it. With a causal mask and one layer it still does
not; with two it does: the mask alone lets a model see order. The gap says how much; measured
without positions, without the mask and without both, it says what causes it.
Source: Zuo & Guerzhoy 2024, arXiv 2402.05969; for neighbouring positions arXiv 2501.00073.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.arguments import SEEDS, check_booleans, check_integers, check_optional
from hooks.errors import UnsupportedModelError
from hooks.measures.symmetry.orders import asked_orders, orders_of
from hooks.measures.symmetry.positions import find_removals, rounding
from hooks.measures.symmetry.report import FLOORS, REACH, SymmetryReport, SymmetrySettings
from hooks.model import (
    HookedModel,
    MaskLike,
    ModelInput,
    Prompts,
    Tokens,
    arguments_of,
    check_model,
    checked_logits,
    counting,
    encode,
    evaluating,
    has_decoder,
    input_device,
    measurement,
    model_dtype,
    refuse_other_inputs,
    run_with,
    without_cache,
)
from hooks.sites import (
    Hook,
    LayerSites,
    attention_facts,
    choose_layers,
    refuse_several_streams,
    sites_for,
    stream_hook,
)


@measurement
def symmetry_gap(
    model: HookedModel,
    tokens: Tokens,
    *,
    permutations: int | Sequence[Sequence[int]] | np.ndarray | Tensor = 8,
    seed: int = 0,
    keep_first: bool = False,
    positions: bool | None = None,
    mask: bool | None = None,
    layers: Sequence[int] | None = None,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool | None = None,
    name: str | None = None,
) -> SymmetryReport:
    """Change of the last position's prediction and stream when the earlier tokens are permuted.

        gap = E_pi D(p(. | x_1 .. x_n), p(. | x_pi(1) .. x_pi(n-1), x_n))

    with D the Kullback-Leibler divergence (nats), the total variation, the largest difference of
    logits, and whether the arg max moves; and for each layer |y - y_pi| / |y| of the residual
    stream y of the last position after its block. Everything is measured four times where the model
    allows it: as it is, without positions (every token has the same position id), without the mask
    (every token sees every token), and without both: what then remains is rounding, or something
    else in the model that reads order. The report names what could not be removed.

    *Rounding*: the same prompt is run again with the last digit of the stream (float32's, in
        float64 too: many models norm in float32 whatever their dtype) changed at random at the
        input of every block. Each prompt's gap is compared with the change that this makes: clearly
        above it there is a gap; within ten times of it there is none where rounding is small, and
        the verdict is undecided where rounding is large (mostly in half precision):
        :meth:`hooks.SymmetryReport.verdict`.

    *Neighbours*: the cosine similarity of the stream at positions i and i - d, by layer and d, of
        the unpermuted prompts (without the first token): where order comes only from the mask,
        nearer positions become more alike (arXiv 2501.00073).

    Source: Zuo & Guerzhoy 2024 (arXiv 2402.05969); the law for one layer and for two is ours.

    Args:
        model: a TransformerBridge of a model of one sequence of tokens. Left as found.
        tokens, attention_mask, prepend_bos, progress, name: as in
            :func:`hooks.collapse_probe`.
        permutations: how many to draw for each prompt (uniformly from those that change its ids:
            equal tokens may change places), or the permutations themselves (a list of lists, an
            array or a tensor ``[permutation, position]``), each the positions 0 .. n-1 in the new
            order of their tokens, the last one last.
        seed: of the draws; a prompt's draws depend on it and on the prompt's index.
        keep_first: leave the first token (BOS, ``[``) in its place too: positions 1 .. n-2 are
            permuted, counted from 0; else 0 .. n-2, the paper's.
        positions: True: measure with positions as they are; False: without; None: both, where they
            can be removed.
        mask: as ``positions``, for the causal mask (or any other).
        layers: block indices whose streams are measured; default: every attention layer.
        batch_size: sequences per forward pass; only those of one length share one.

    Returns:
        :class:`SymmetryReport`.

    Raises:
        UnsupportedModelError: positions or mask can't be removed as requested; a model of two
            sequences, of images or sound; logits or a stream that are not finite; or no hook at a
            block's input or output.
        ValueError: a prompt with fewer than two tokens to permute, or with only equal ones; a given
            permutation that leaves a prompt's ids as they are; or a wrong argument.
    """
    batch_size, seed = check_integers(batch_size=(batch_size, 1), seed=(seed, 0, SEEDS))
    asked = asked_orders(permutations)
    (keep_first,) = check_booleans(keep_first=keep_first)
    positions, mask, _, progress = check_optional(
        positions=positions, mask=mask, prepend_bos=prepend_bos, progress=progress
    )
    check_model(model)
    _refuse_two_sequences(model)
    prompts = encode(model, tokens, attention_mask=attention_mask, prepend_bos=prepend_bos)
    sites = sites_for(model, prompts)
    chosen = choose_layers(sites, layers)
    refuse_other_inputs("symmetry_gap", prompts.extra)
    orders = orders_of(prompts, asked, seed, keep_first)
    removals = find_removals(model, list(sites), prompts)
    variants = removals.variants(positions, mask)
    rows = _Rows(prompts, orders)
    measured = []
    total = len(variants) * len(prompts)
    with evaluating(model), counting(total, "symmetry", "prompt", progress) as bar:
        for variant in variants:
            run = _Run(model, chosen, partial(removals.arguments, variant))
            measured.append(_measure(run, rows, batch_size, seed, bar))
    settings = SymmetrySettings(
        permutations=len(orders[0]) - 1,
        seed=seed if isinstance(asked, int) else None,
        keep_first=keep_first,
        variants=tuple(v.name for v in variants),
        layers=tuple(s.layer for s in chosen),
    )
    facts = attention_facts(model, sites, chosen, prompts, name) | {
        name: {"status": removal.status, "why": removal.why}
        for name, removal in (("positions", removals.positions), ("mask", removals.mask))
    }
    arrays = {name: np.stack([m[name] for m in measured]) for name in measured[0]}
    return SymmetryReport(
        settings=settings,
        model=facts,
        tokens=prompts.strings,
        orders=tuple(o[1:] for o in orders),
        **arrays,
    )


def _refuse_two_sequences(model: HookedModel) -> None:
    cfg = model.cfg
    signal = getattr(cfg, "is_visual_model", False) or getattr(cfg, "is_audio_model", False)
    if has_decoder(model) or signal:
        raise UnsupportedModelError(
            "the order of tokens",
            wanted="a model of one sequence of tokens",
            got="images or sound" if signal else "an encoder and a decoder",
        )


# -- running ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Each prompt as it is, permuted, and repeated as often as rounding is tried."""

    prompts: Prompts
    orders: Sequence[Int[np.ndarray, "_ _"]]

    @property
    def each(self) -> int:
        """Rows of one prompt."""
        return len(self.orders[0]) + FLOORS

    def by_length(self) -> Iterator[list[int]]:
        """Prompts of one length."""
        lengths = [len(ids) for ids in self.prompts.first]
        for length in dict.fromkeys(lengths):
            yield [i for i, n in enumerate(lengths) if n == length]

    def rng(self, seed: int, prompt: int, number: int) -> torch.Generator | None:
        """The generator of a row's last digits, if rounding is tried on it."""
        if number < self.each - FLOORS:
            return None
        state = int(np.random.SeedSequence([seed, prompt, number]).generate_state(1)[0])
        return torch.Generator().manual_seed(state)

    def tokens(self, prompt: int) -> Int[Tensor, "row pos"]:
        """Ids of all rows of a prompt; rounding is tried on the last ones."""
        ids = self.prompts.first[prompt]
        permuted = ids[torch.from_numpy(self.orders[prompt])]
        return torch.cat([permuted, ids.expand(FLOORS, -1)])


@dataclass(frozen=True)
class _Shown:
    """What one row showed: the last position's logits and stream, and how alike neighbours are.

    Attributes:
        logits: float64.
        stream: before the first of the blocks, and after each, float64.
        update: what each block added, float64.
        alike: sums and counts of cosines ``[point, distance, 2]``, and pairs in which the nearer
            position was more alike ``[point, 2]``; None for permuted rows.
    """

    logits: Float[Tensor, "d_vocab"]
    stream: Float[Tensor, "point d_model"]
    update: Float[Tensor, "layer d_model"]
    alike: tuple[np.ndarray, np.ndarray] | None


class _Run:
    """Forward passes of one variant of the model."""

    def __init__(self, model: HookedModel, layers: Sequence[LayerSites], arguments: Any) -> None:
        self.model = model
        self.layers = layers
        self.arguments = arguments
        self.starts = [stream_hook(model, sites) for sites in layers]
        self.ends = [stream_hook(model, sites, after=True) for sites in layers]
        self.device, self.dtype = input_device(model), model_dtype(model)
        self.options: dict[str, Any] = without_cache(model)
        if "logits_to_keep" in arguments_of(model):  # all positions' would be the largest tensor
            self.options["logits_to_keep"] = 1

    def rows(
        self,
        ids: Int[Tensor, "row pos"],
        clean: Sequence[bool],
        tried: Sequence[torch.Generator | None],
    ) -> list[_Shown]:
        """One forward pass.

        ``clean``: whether a row is the unpermuted prompt, whose neighbours are compared; ``tried``:
        the generator of a row's last digits, where rounding is tried.
        """
        named = {
            name: value.expand(len(ids), *value.shape).to(self.device)
            for name, value in self.arguments(ids.shape[1], self.dtype).items()
        }
        kept: dict[str, Tensor] = {}
        given = ModelInput(ids, {**self.options, **named})
        logits = run_with(self.model, given, self._hooks(kept, tried))
        for sites, name in zip(self.layers, self.ends, strict=True):
            if name not in kept or not bool(torch.isfinite(kept[name]).all()):
                raise UnsupportedModelError(
                    "symmetry gap",
                    wanted="finite numbers in the residual stream",
                    got="no such tensor" if name not in kept else "an infinite one or NaN",
                    layer=sites.layer,
                )
            refuse_several_streams(kept[name], sites)
        last = _finite(checked_logits(logits, classifier=False))
        whole = [kept[self.starts[0]], *(kept[name] for name in self.ends)]
        starts, ends = (
            torch.stack([kept[n][:, -1] for n in names], 1).double().cpu()
            for names in (self.starts, self.ends)
        )
        points = torch.cat([starts[:, :1], ends], 1)
        out = []
        for row, is_clean in enumerate(clean):
            alike = neighbours([x[row] for x in whole]) if is_clean else None
            out.append(_Shown(last[row], points[row], ends[row] - starts[row], alike))
        return out

    def _hooks(
        self, kept: dict[str, Tensor], tried: Sequence[torch.Generator | None]
    ) -> list[Hook]:
        def at_start(x: Tensor, hook: Any, name: str) -> Tensor:
            unit = rounding(x.dtype)
            kept[name] = x.clone()
            for row, rng in zip(kept[name], tried, strict=True):
                if rng is not None:
                    signs = torch.randint(0, 2, row.shape, generator=rng) * 2 - 1
                    row += row * unit * signs.to(row)
            return kept[name]

        def at_end(x: Tensor, hook: Any, name: str) -> None:
            kept[name] = x

        starts: list[Hook] = [(n, partial(at_start, name=n)) for n in self.starts]
        return [*starts, *((n, partial(at_end, name=n)) for n in self.ends)]


def _finite(logits: Float[Tensor, "row pos d_vocab"]) -> Float[Tensor, "row d_vocab"]:
    """The last position's, float64."""
    last = logits[:, -1].double().cpu()
    if not bool(torch.isfinite(last).all()):
        raise UnsupportedModelError(
            "symmetry gap", wanted="finite logits", got="an infinite one or NaN"
        )
    return last


# -- measuring --------------------------------------------------------------------------------


def _measure(run: _Run, rows: _Rows, batch_size: int, seed: int, bar: Any) -> dict[str, np.ndarray]:
    """Every prompt's numbers in one variant."""
    found: dict[int, dict[str, np.ndarray]] = {}
    similar = np.zeros((len(run.layers) + 1, REACH, 2))
    nearer = np.full((len(rows.prompts), len(run.layers) + 1), np.nan)
    for same in rows.by_length():
        todo = [(prompt, number) for prompt in same for number in range(rows.each)]
        pending: dict[int, list[_Shown]] = {}
        for at in range(0, len(todo), batch_size):
            batch = todo[at : at + batch_size]
            ids = torch.stack([rows.tokens(prompt)[number] for prompt, number in batch])
            clean = [number == 0 for _, number in batch]
            tried = [rows.rng(seed, *which) for which in batch]
            for (prompt, _), shown in zip(batch, run.rows(ids, clean, tried), strict=True):
                pending.setdefault(prompt, []).append(shown)
                if len(pending[prompt]) < rows.each:
                    continue
                done = pending.pop(prompt)
                found[prompt] = changes(done)
                assert done[0].alike is not None
                similar += done[0].alike[0]
                nearer[prompt] = done[0].alike[1]
                bar.update()
    numbers = {
        name: np.stack([found[i][name] for i in range(len(rows.prompts))]) for name in found[0]
    }
    first = rows.each - 1 - FLOORS  # from here on rounding was tried
    out = {name: values[:, :first] for name, values in numbers.items()}
    out |= {f"floor_{name}": numbers[name][:, first:] for name in ("tv", "logits", "stream")}
    with np.errstate(invalid="ignore"):
        cosines = similar[..., 0] / similar[..., 1]
    return {**out, "similarity": cosines, "pairs": similar[0, :, 1], "nearer": nearer}


def changes(shown: Sequence[_Shown]) -> dict[str, np.ndarray]:
    """How much the first row's last position differs from that of each of the others."""
    clean, others = shown[0], shown[1:]
    logits = torch.stack([s.logits for s in others])
    log_p, log_q = clean.logits.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    stream = torch.stack([s.stream for s in others]) - clean.stream
    update = torch.stack([s.update for s in others]) - clean.update
    length = torch.linalg.vector_norm(clean.stream, dim=-1)

    def over(x: Tensor, by: Tensor) -> np.ndarray:
        size = torch.linalg.vector_norm(x, dim=-1)
        return torch.where(size > 0, size / by, 0.0).numpy()

    return {
        # Rounding may make the divergence of equal distributions negative by 1e-17.
        "kl": (p * (log_p - log_q)).sum(-1).clamp_min(0).numpy(),
        "tv": 0.5 * (p - log_q.exp()).abs().sum(-1).numpy(),
        "logits": (logits - clean.logits).abs().amax(-1).numpy(),
        "moved": (logits.argmax(-1) != clean.logits.argmax(-1)).numpy(),
        "stream": over(stream, length),
        "added": over(update, length[1:]),
    }


def neighbours(
    streams: Sequence[Float[Tensor, "pos d_model"]],
) -> tuple[Float[np.ndarray, "point distance 2"], Float[np.ndarray, "point"]]:
    """Cosines of positions i and i - d by d, summed and counted; and are the nearer more alike?

    The first position is left out. The second is the share of pairs of distances d < e <= REACH,
    over all i, in which position i - d is more alike to i than i - e (ties count half): 1/2 where
    distance says nothing; NaN without a pair.
    """
    x = torch.stack([stream[1:] for stream in streams]).double()
    x = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-300)).cpu()
    n = x.shape[1]
    band = torch.zeros(len(x), n, REACH, dtype=torch.float64)
    for d in range(1, min(REACH, n - 1) + 1):
        band[:, d:, d - 1] = (x[:, d:] * x[:, :-d]).sum(-1)
    counted = torch.arange(n)[:, None] > torch.arange(REACH)  # position i has one at i - d
    sums = torch.stack([band.sum(1), counted.sum(0).double().expand(len(x), -1)], -1)
    i, near, far = torch.triu(counted[:, :, None] & counted[:, None], 1).nonzero(as_tuple=True)
    apart = band[:, i, near] - band[:, i, far]
    share = 0.5 * (1 + apart.sign().mean(-1))  # NaN without a pair
    return sums.numpy(), share.numpy()
