"""What a good user of another tool would write for a collapse curve, by sampling.

Two ways with each tool. *Cached*: one clean pass that keeps every layer's scores, then draws of the
noise on the cached scores in vectorised torch (:func:`draw_shifts`). *Per pass* (the paper's
protocol): a forward pass for each layer, sigma and draw, with that layer's q and k scaled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPARSE = 0.95
Layers = list[tuple[Tensor, Tensor]]  # scores and pattern of each layer, [batch, head, pos, pos]


@dataclass(frozen=True)
class Shape:
    """Sizes that the noise needs."""

    layers: int
    heads: int
    kv_heads: int
    d_head: int

    @classmethod
    def of(cls, cfg: Any) -> Shape:
        """Of a bridge's configuration."""
        kv = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
        return cls(cfg.n_layers, cfg.n_heads, kv, cfg.d_head)


def draw_shifts(
    layers: Layers, shape: Shape, sigmas: Sequence[float], draws: Sequence[int]
) -> Tensor:
    """Sparse rows whose arg max moves, [draw, sigma, layer, head], uniform noise on q and k.

    Whole score tensors at a time, as one writes it; a draw's numbers serve all its sigmas.
    """
    counts = torch.zeros(len(draws), len(sigmas), shape.layers, shape.heads)
    for index, (scores, pattern) in enumerate(layers):
        sparse = pattern.amax(-1) >= SPARSE
        sparse[:, :, 0] = False  # the first row sees one key
        star = scores.argmax(-1)
        for at, draw in enumerate(draws):
            u_q, u_k = _uniforms(shape, scores.shape[0], scores.shape[2], draw, index)
            for s, sigma in enumerate(sigmas):
                a = math.sqrt(3) * sigma
                noisy = scores * (1 + a * u_q)[..., None] * (1 + a * u_k)[:, :, None, :]
                moved = (noisy.argmax(-1) != star) & sparse
                counts[at, s, index] = moved.sum((0, 2))
    return counts


def draw_shifts_gathered(
    layers: Layers, shape: Shape, sigmas: Sequence[float], draws: Sequence[int]
) -> Tensor:
    """The counts of :func:`draw_shifts` with the least work that sampling can do.

    Only the sparse rows are gathered and multiplied, and the query's factor, which scales a whole
    row and so moves no arg max, is left out.
    """
    counts = torch.zeros(len(draws), len(sigmas), shape.layers, shape.heads)
    for index, (scores, pattern) in enumerate(layers):
        batch, _, pos, _ = scores.shape
        b, h, i = (pattern[:, :, 1:].amax(-1) >= SPARSE).nonzero(as_tuple=True)
        rows = scores[b, h, i + 1]
        star, of_key = rows.argmax(-1), b * shape.heads + h
        for at, draw in enumerate(draws):
            _, u_k = _uniforms(shape, batch, pos, draw, index)
            kappa = u_k.reshape(-1, pos)
            for s, sigma in enumerate(sigmas):
                factor = (1 + math.sqrt(3) * sigma * kappa).index_select(0, of_key)
                moved = factor.mul_(rows).argmax(-1) != star
                counts[at, s, index] = torch.bincount(h[moved], minlength=shape.heads)
    return counts


def _uniforms(shape: Shape, batch: int, pos: int, draw: int, layer: int) -> tuple[Tensor, Tensor]:
    """Numbers from -1 to 1 of queries and keys, [batch, head, pos]; heads share their key's."""
    generator = torch.Generator().manual_seed(draw * shape.layers + layer)
    u_k = torch.rand(batch, shape.kv_heads, pos, generator=generator) * 2 - 1
    u_q = torch.rand(batch, shape.heads, pos, generator=generator) * 2 - 1
    return u_q, u_k.repeat_interleave(shape.heads // shape.kv_heads, dim=1)


def factors(shape: Shape, batch: int, pos: int, sigma: float) -> tuple[Tensor, Tensor]:
    """1 + kappa of queries and keys, [batch, pos, head]."""
    generator = torch.Generator().manual_seed(0)
    a = math.sqrt(3) * sigma
    return tuple(
        1 + a * (torch.rand(batch, pos, n, generator=generator) * 2 - 1)
        for n in (shape.heads, shape.kv_heads)
    )  # type: ignore[return-value]


def predicted(scores: Tensor, shape: Shape, sigma: float) -> Tensor:
    """The pattern that the factors of :func:`factors` must give, from clean scores."""
    f_q, f_k = factors(shape, scores.shape[0], scores.shape[2], sigma)
    f_k = f_k.repeat_interleave(shape.heads // shape.kv_heads, dim=2)
    both = f_q.permute(0, 2, 1)[..., None] * f_k.permute(0, 2, 1)[:, :, None, :]
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return (scores * both).masked_fill(~visible, -math.inf).softmax(-1)


# -- TransformerLens --------------------------------------------------------------------------


def lens_cached(bridge: Any, tokens: Tensor, names: Sequence[tuple[str, str]]) -> Layers:
    """Scores and patterns by `run_with_cache`, nothing else kept."""
    wanted = [name for pair in names for name in pair]
    _, cache = bridge.run_with_cache(tokens, names_filter=wanted)
    return [(cache[scores], cache[pattern]) for scores, pattern in names]


def lens_pass(
    bridge: Any, tokens: Tensor, shape: Shape, sites: Any, sigma: float
) -> Callable[[], Tensor]:
    """One pass of the protocol by `run_with_hooks`: the noised layer's pattern."""
    f_q, f_k = factors(shape, *tokens.shape, sigma)

    def run() -> Tensor:
        seen: list[Tensor] = []

        def scale(factor: Tensor) -> Callable[..., Tensor]:
            return lambda x, hook: x * factor[..., None]

        bridge.run_with_hooks(
            tokens,
            fwd_hooks=[
                (sites.vector("q").dot.hook, scale(f_q)),
                (sites.vector("k").dot.hook, scale(f_k)),
                (sites.pattern, lambda x, hook: seen.append(x)),
            ],
        )
        return seen[0]

    return run


# -- nnsight ----------------------------------------------------------------------------------


class Nnsight:
    """The same in nnsight: q and k are read, and scaled, where the model calls its attention."""

    def __init__(self, bare: Any, tokens: Tensor, shape: Shape) -> None:
        from nnsight import NNsight

        inner = copy.deepcopy(bare)  # nnsight changes how a model runs
        self.traced, self.tokens, self.shape = NNsight(inner), tokens, shape
        self.path = "transformer.h" if hasattr(inner, "transformer") else "model.layers"
        self.attention = "attn" if hasattr(inner, "transformer") else "self_attn"

    def _attention(self, layer: int) -> Any:
        blocks = self.traced
        for part in self.path.split("."):
            blocks = getattr(blocks, part)
        return getattr(blocks[layer], self.attention)

    def cached(self) -> Layers:
        """One trace; the scores are made from the q and k that it saved."""
        import nnsight

        layers = [self._attention(layer) for layer in range(self.shape.layers)]
        saved: list[Any] = []
        with self.traced.trace(self.tokens, use_cache=False):
            for attention in layers:
                inputs = attention.source.attention_interface_1.inputs[0]
                saved.append((inputs[1], inputs[2], attention.output[1]))
            nnsight.save(saved)
        repeats = self.shape.heads // self.shape.kv_heads
        visible = torch.ones(self.tokens.shape[1], self.tokens.shape[1], dtype=torch.bool).tril()
        lowest = torch.finfo(torch.float32).min
        out: Layers = []
        for q, k, pattern in saved:
            scores = q @ k.repeat_interleave(repeats, dim=1).transpose(-1, -2)
            scores.mul_(self.shape.d_head**-0.5).masked_fill_(~visible, lowest)
            out.append((scores, pattern))
        return out

    def noised(self, layer: int, sigma: float) -> Callable[[], Tensor]:
        """One pass of the protocol: the noised layer's pattern."""
        f_q, f_k = (
            f.permute(0, 2, 1)[..., None] for f in factors(self.shape, *self.tokens.shape, sigma)
        )
        attention = self._attention(layer)

        def run() -> Tensor:
            with self.traced.trace(self.tokens, use_cache=False):
                call = attention.source.attention_interface_1
                (module, q, k, *rest), named = call.inputs
                call.inputs = ((module, q * f_q, k * f_k, *rest), named)
                pattern = attention.output[1].save()
            return pattern  # noqa: RET504  nnsight runs the block later, and fills the name

        return run


# -- pyvene -----------------------------------------------------------------------------------


def pyvene_pass(
    bare: Any, tokens: Tensor, shape: Shape, layer: int, sigma: float
) -> Callable[[], Tensor]:
    """One pass of the protocol in pyvene: the noised layer's pattern.

    Its own `NoiseIntervention` adds one fixed gaussian array of four positions and can't express a
    factor on a norm; an intervention class of one's own can. The units must be named: without
    `unit_locations`, 0.1.8 hands GPT-2's whole fused projection to an intervention on the query.
    """
    import pyvene

    class ScaleHeads(pyvene.LocalistRepresentationIntervention, pyvene.ConstantSourceIntervention):
        factor: Tensor  # [batch, pos, head]

        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
            heads = base.unflatten(-1, (self.factor.shape[-1], -1))
            return (heads * self.factor[..., None]).flatten(-2)

    parts = ("query_output", "key_output")
    model = pyvene.IntervenableModel(
        pyvene.IntervenableConfig(
            [{"layer": layer, "component": c, "intervention_type": ScaleHeads} for c in parts]
        ),
        copy.deepcopy(bare),
    )
    for kind, factor in zip(parts, factors(shape, *tokens.shape, sigma), strict=True):
        (key,) = (name for name in model.interventions if kind in name)
        held = model.interventions[key]
        (held[0] if isinstance(held, (tuple, list)) else held).factor = factor
    batch, pos = tokens.shape
    everywhere = [[list(range(pos))] * batch] * len(parts)
    gpt2 = hasattr(bare, "transformer")
    block = (model.model.transformer.h if gpt2 else model.model.model.layers)[layer]
    attention = block.attn if gpt2 else block.self_attn

    plain, seen = attention.forward, list[Tensor]()

    def shown(*args: Any, **named: Any) -> Any:
        out = plain(*args, **named)
        seen.append(out[1])
        return out

    # Neither a hook nor `output_attentions`, which is served by hooks: pyvene removes all of them.
    attention.forward = shown

    def run() -> Tensor:
        seen.clear()
        model({"input_ids": tokens, "use_cache": False}, unit_locations={"base": everywhere})
        return seen[0]

    return run
