"""A row of the matrix recomputed: what `hooks` counts on the bridge, and what the model does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import hooks
from hooks.model.encoding import encode
from hooks.model.protocol import Role
from hooks.sites.types import AttentionSites
from hooks.sites.watch import observe
from tests.oracles import shifts as reference
from tests.support import builders

SIGMA, DRAWS, POS = 0.4, 2, 21
SPARSE = (0.95, 0.6, 0.35)
LEAST_MOVES = 4  # fewer arg max shifts prove nothing: then rows of a smaller maximum are asked
MARGIN = 1e-3  # of a row's logarithmic lead: closer ones may fall either way in float32
WRITTEN = 1e-3  # of a weight under noise, in float32


class Disagreement(AssertionError):
    """The library counts what the model does not do."""


@dataclass(frozen=True)
class Truth:
    """The attentions of the model itself on some inputs, and their patterns under each draw."""

    calls: list[reference.AttentionCall]
    noisy: list[list[torch.Tensor]]


def truth(hf: Any, inputs: reference.Inputs, sites: AttentionSites) -> Truth:
    """What the Hugging Face model does in float64.

    Raises:
        Disagreement: it has other attentions, or heads, than the library found.
    """
    every = reference.attentions(hf, inputs)
    # What is left out is over windows: its queries are no sequence's.
    lengths = {
        x.shape[-1] for x in (inputs[0][0], inputs[1].get("decoder_input_ids")) if x is not None
    }
    over = [not sites.left_out or call.n_query in lengths for call in every]
    calls = [call for call, whole in zip(every, over, strict=True) if whole]
    if len(calls) != len(sites):
        raise Disagreement(f"{len(sites)} attentions found; the model takes {len(calls)}")
    for layer, call in zip(sites, calls, strict=True):
        if (layer.n_heads, layer.n_kv_heads) != (call.n_heads, call.n_kv_heads):
            raise Disagreement(
                f"{layer.label}: {layer.n_heads} heads on {layer.n_kv_heads}; the model has "
                f"{call.n_heads} on {call.n_kv_heads}"
            )
        if list(layer.kv_head_of) != call.kv_head.tolist():
            raise Disagreement(f"{layer.label}: heads read {layer.kv_head_of}; {call.kv_head}")
    noisy = []
    for draw in range(DRAWS):
        mine = iter(_factors(sites, calls, draw))
        factors = [next(mine) if whole else (None, None) for whole in over]
        patterns = reference.noised(hf, inputs, factors, every)
        noisy.append([p for p, whole in zip(patterns, over, strict=True) if whole])
    return Truth(calls, noisy)


def _factors(
    sites: AttentionSites, calls: list[reference.AttentionCall], draw: int
) -> list[reference.Factors]:
    noise = hooks.NormNoise(sigma=SIGMA, on="qk", draw=draw)
    factors: list[reference.Factors] = []
    for layer, call in zip(sites, calls, strict=True):
        shapes: dict[Role, tuple[int, int]] = {
            "q": (call.n_query, call.n_heads),
            "k": (call.n_key, call.n_kv_heads),
        }
        drawn = {
            role: noise.factors(
                layer=layer.layer, role=role, n_heads=n_heads, prompts=[0], n_pos=n_pos
            )[0].double()
            for role, (n_pos, n_heads) in shapes.items()
        }
        factors.append((drawn["q"], drawn["k"]))
    return factors


def recompute(built: builders.Built, sites: AttentionSites, real: Truth) -> tuple[int, int, float]:
    """Rows, shifts and the least maximum of these rows, on plain inputs; the same on both sides.

    Raises:
        Disagreement: the library's numbers are not the model's.
    """
    inputs = built.inputs(1, POS, 0)
    _check_writes(built.model, inputs, sites, real.noisy[0])
    for sparse in SPARSE:
        rows, moved = compare(probe(built.model, inputs, sparse), sites, real, sparse)
        if moved >= LEAST_MOVES:
            return rows, moved, sparse
    raise Disagreement(f"only {moved} arg max shifts among {rows} rows: nothing is proven")


def probe(
    model: Any,
    inputs: reference.Inputs | dict[str, Any],
    sparse: float,
    first_prompt: int = 0,
    batch_size: int | None = None,
) -> hooks.CollapseReport:
    """The library's own counts, of a tensor or of named inputs."""
    given, decoder = inputs, None
    if isinstance(inputs, tuple):
        (given,), named = inputs
        decoder = named.get("decoder_input_ids")
    return hooks.collapse_probe(
        model,
        given,
        decoder_tokens=decoder,
        sigmas=[SIGMA],
        method="sample",
        draws=DRAWS,
        sparse=sparse,
        first_prompt=first_prompt,
        batch_size=batch_size,
        progress=False,
    )


def _check_writes(
    model: Any, inputs: reference.Inputs, sites: AttentionSites, noisy: list[torch.Tensor]
) -> None:
    """Where no hook carries q and k, the noise of a NormNoise makes the pattern it should."""
    (first,), named = inputs
    prompts = encode(model, first, decoder_tokens=named.get("decoder_input_ids"))
    for layer, wanted in zip(sites, noisy, strict=True):
        if not layer.bare:
            continue
        seen: list[torch.Tensor] = []
        noise = hooks.NormNoise(sigma=SIGMA, on="qk", layers=(layer.layer,))
        with noise.applied(model):
            observe(
                model,
                [layer],
                prompts,
                lambda view, to=seen: to.append(view.pattern[0]),
                beside=True,
            )
        error = float((seen[0].double() - wanted).abs().max())
        if not error < WRITTEN:
            raise Disagreement(f"{layer.label}: a pattern under noise is {error:.2g} off")


def compare(
    report: hooks.CollapseReport, sites: AttentionSites, real: Truth, sparse: float
) -> tuple[int, int]:
    """Sparse rows and arg max shifts, the same on both sides but for what rounding decides.

    Raises:
        Disagreement: they are not.
    """
    rows = moved = 0
    for i, (layer, call) in enumerate(zip(sites, real.calls, strict=True)):
        n = layer.n_heads
        mine = torch.as_tensor(report.rows[i, :n].sum((1, 2)))
        _same(mine, *_bounds(call, sparse), f"{layer.label}: sparse rows")
        rows += int(mine.sum())
        for draw in range(DRAWS):
            counted = torch.as_tensor(report.loose_draws[0, draw, i, :n].sum(-1)).round().long()
            surely, maybe = _shift_bounds(call, real.noisy[draw][i], sparse)
            _same(counted, surely, maybe, f"{layer.label}: shifts in draw {draw}")
            moved += int(counted.sum())
    return rows, moved


def _bounds(call: reference.AttentionCall, sparse: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are sparse for certain and perhaps, by head."""
    low, high = (reference.sparse_rows(call, sparse * f) for f in (1 + MARGIN, 1 - MARGIN))
    return low.sum(-1), high.sum(-1)


def _shift_bounds(
    call: reference.AttentionCall, noisy: torch.Tensor, sparse: float
) -> tuple[torch.Tensor, torch.Tensor]:
    star = call.pattern.argmax(-1, keepdim=True)
    others = noisy.scatter(-1, star, 0.0).amax(-1)
    lead = others.log() - noisy.gather(-1, star).squeeze(-1).log()
    surely = reference.sparse_rows(call, sparse * (1 + MARGIN)) & (lead > MARGIN)
    maybe = reference.sparse_rows(call, sparse * (1 - MARGIN)) & (lead > -MARGIN)
    return surely.sum(-1), maybe.sum(-1)


def _same(mine: torch.Tensor, least: torch.Tensor, most: torch.Tensor, what: str) -> None:
    if not bool(((least <= mine) & (mine <= most)).all()):
        raise Disagreement(
            f"{what}: {mine.tolist()} by head; the model has {least.tolist()} to {most.tolist()}"
        )
