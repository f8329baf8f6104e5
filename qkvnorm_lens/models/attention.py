"""Attention with No-Norm, Pre-Norm or QKV-Norm, composed of the same small parts.

    q = W_Q x   k_t = W_K y_t   v_t = W_V y_t   a = softmax_t(c q.k_t)   x <- x + W_O sum_t a_t v_t

Menary et al. 2024 (arXiv 2406.17837), Section 2. With n(z) = sqrt(dim) z / |z|, a block reads

    No-Norm     q = W_Q x                     k and v likewise
    Pre-Norm    q = W_Q (g_q * n(x))          k and v alike, each with its own gain
    QKV-Norm    q = g_q * n(W_Q x)            k and v alike, head by head

so a placement only decides which parts are identities: `block_norm`, `input_gain`, `head_norm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import nn

from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.norms import Calibrated, Gain, Norm

Tap = Callable[[str, torch.Tensor], torch.Tensor]
"""Receives each intermediate value under its hook's name, and returns the one to use."""


def no_tap(name: str, value: torch.Tensor) -> torch.Tensor:
    """The tap of a model that nobody watches."""
    return value


def block_norm(cfg: QKVNormConfig) -> nn.Module:
    """The part before attention: a norm under Pre-Norm, nothing under the other two."""
    if cfg.placement != "pre" or cfg.norm is None:
        return nn.Identity()
    gain = (cfg.d_model,) if cfg.norm.gains == "shared" else None
    return Norm(cfg.norm.kind, gain=gain, eps=cfg.eps)


def input_gain(cfg: QKVNormConfig) -> nn.Module:
    """The part between the block's norm and one of W_Q, W_K, W_V: Pre-Norm's separate gain."""
    if cfg.placement != "pre" or cfg.norm is None or cfg.norm.gains != "separate":
        return nn.Identity()
    return Gain(cfg.d_model)


def head_norm(cfg: QKVNormConfig, site: str) -> nn.Module:
    """The part after one of W_Q, W_K, W_V: QKV-Norm's norm, over each head or all of them."""
    if cfg.placement != "qkv" or cfg.norm is None or site not in cfg.norm.on:
        return nn.Identity()
    gain = (cfg.n_heads if site == "q" else cfg.n_kv, cfg.d_head)
    return Norm(
        cfg.norm.kind,
        gain=gain if cfg.norm.gains == "separate" else None,
        dims=1 if cfg.norm.over == "head" else 2,
        eps=cfg.eps,
    )


def shared_gain(cfg: QKVNormConfig) -> nn.Module:
    """The one gain after all of QKV-Norm's norms, if they share it."""
    if cfg.placement != "qkv" or cfg.norm is None or cfg.norm.gains != "shared":
        return nn.Identity()
    return Gain(cfg.n_heads, cfg.d_head)


def calibrated(cfg: QKVNormConfig, std: float) -> nn.Module:
    """One of the paper's calibrated scales, if the configuration has them."""
    return Calibrated(std) if cfg.calibrated else nn.Identity()


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotary positions: pairs of components of q and k are rotated by an angle p f_i.

    Args:
        cos: its cosine, for each position and pair.
        sin: its sine.
        adjacent: pairs are (2i, 2i + 1); else (i, i + half), as in Hugging Face's Llama.
    """

    cos: Float[torch.Tensor, "batch pos 1 pair"]
    sin: Float[torch.Tensor, "batch pos 1 pair"]
    adjacent: bool

    def __call__(
        self, x: Float[torch.Tensor, "batch pos head d_head"]
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """Rotate the first 2 x pairs components and pass the rest."""
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        if self.adjacent:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class KVCache:
    """Keys and values of the tokens already seen, layer by layer."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return next(iter(self._layers.values()))[0].shape[2] if self._layers else 0

    def get_seq_length(self) -> int:
        """Number of tokens already seen, under the name used by Hugging Face's caches."""
        return len(self)

    def update(
        self,
        k: Float[torch.Tensor, "batch kv_head new d_head"],
        v: Float[torch.Tensor, "batch kv_head new d_head"],
        layer: int,
    ) -> tuple[
        Float[torch.Tensor, "batch kv_head all d_head"],
        Float[torch.Tensor, "batch kv_head all d_head"],
    ]:
        """Append the new tokens' keys and values, and return all of that layer's."""
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = torch.cat((old_k, k), 2), torch.cat((old_v, v), 2)
        self._layers[layer] = (k, v)
        return k, v


class Attention(nn.Module):
    """``z = sum_t softmax_t(c q.k_t) v_t`` and ``W_O z``; Menary et al. 2024, Section 2.

    The `tap` gets, under these names, what the hooks of a bridge show: ``hook_q_normed``,
    ``hook_k_normed``, ``hook_v_normed`` (where a norm follows the projection), ``hook_rot_q``,
    ``hook_rot_k`` (where positions are rotary), all [batch, pos, head, d_head], then
    ``hook_attn_scores`` (pre-softmax, masked = -inf) and ``hook_pattern``, [batch, head, query,
    key], which do not exist on sdpa.
    """

    def __init__(self, cfg: QKVNormConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.n_heads, self.n_kv_heads, self.d_head = cfg.n_heads, cfg.n_kv, cfg.d_head
        self.sdpa = cfg.attn_implementation == "sdpa"
        self.centred = cfg.centred
        q_width, kv_width = cfg.n_heads * cfg.d_head, cfg.n_kv * cfg.d_head
        self.q = nn.Linear(cfg.d_model, q_width, bias=cfg.attn_bias)
        self.k = nn.Linear(cfg.d_model, kv_width, bias=cfg.attn_bias)
        self.v = nn.Linear(cfg.d_model, kv_width, bias=cfg.attn_bias)
        self.o = nn.Linear(q_width, cfg.d_model, bias=cfg.attn_bias)
        self.q_gain, self.k_gain, self.v_gain = (input_gain(cfg) for _ in "qkv")
        self.q_scale, self.k_scale, self.v_scale = (calibrated(cfg, 1.0) for _ in "qkv")
        self.q_norm, self.k_norm, self.v_norm = (head_norm(cfg, site) for site in "qkv")
        self.normed = cfg.norm.on if cfg.placement == "qkv" and cfg.norm is not None else ""
        self.shared_gain = shared_gain(cfg)
        self.score_scale = ScoreScale(cfg)
        self.update_scale = calibrated(cfg, 0.05)

    def forward(
        self,
        hidden_states: Float[torch.Tensor, "batch pos d_model"],
        visible: Bool[torch.Tensor, "#batch 1 pos key"] | None = None,
        rotation: Rotation | None = None,
        past_key_values: KVCache | None = None,
        tap: Tap = no_tap,
    ) -> Float[torch.Tensor, "batch pos d_model"]:
        """One layer's update of the residual stream.

        Args:
            hidden_states: the block's input, normed under Pre-Norm.
            visible: which keys each query sees; None, on sdpa only, for plain causal.
            rotation: rotary positions of the new tokens.
            past_key_values: earlier tokens' keys and values, to which the new ones are added.
            tap: gets the intermediate values.
        """
        x = hidden_states
        q = self._vectors(tap, "q", self.q(self.q_scale(self.q_gain(x))), self.q_norm, rotation)
        k = self._vectors(tap, "k", self.k(self.k_scale(self.k_gain(x))), self.k_norm, rotation)
        v = self._vectors(tap, "v", self.v(self.v_scale(self.v_gain(x))), self.v_norm, None)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        repeats = self.n_heads // self.n_kv_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        z = self._sdpa(q, k, v, visible) if self.sdpa else self._eager(q, k, v, visible, tap)
        if self.centred:
            z = z - visible_mean(v, visible)
        out: torch.Tensor = self.update_scale(self.o(z.transpose(1, 2).flatten(-2)))
        return out

    def _vectors(
        self,
        tap: Tap,
        site: str,
        projected: Float[torch.Tensor, "batch pos width"],
        norm: nn.Module,
        rotation: Rotation | None,
    ) -> Float[torch.Tensor, "batch pos head d_head"]:
        """From a projection's output to the vectors that enter the dot product, or are averaged."""
        x = projected.unflatten(-1, (-1, self.d_head))
        if site in self.normed:
            x = tap(f"hook_{site}_normed", self.shared_gain(norm(x)))
        return x if rotation is None else tap(f"hook_rot_{site}", rotation(x))

    def _eager(
        self,
        q: Float[torch.Tensor, "batch head pos d_head"],
        k: Float[torch.Tensor, "batch head key d_head"],
        v: Float[torch.Tensor, "batch head key d_head"],
        visible: Bool[torch.Tensor, "#batch 1 pos key"] | None,
        tap: Tap,
    ) -> Float[torch.Tensor, "batch head pos d_head"]:
        if visible is None:
            raise ValueError("visible: eager attention wants to be told which keys are seen")
        scores = self.score_scale(q @ k.transpose(-1, -2), visible)
        scores = tap("hook_attn_scores", scores.masked_fill(~visible, -torch.inf))
        # A row that sees no key would be 0/0, also in the gradient: give it scores, then no weight.
        blind = ~visible.any(-1, keepdim=True)
        wide = torch.promote_types(scores.dtype, torch.float32)
        pattern = scores.masked_fill(blind, 0.0).softmax(-1, dtype=wide).masked_fill(blind, 0.0)
        return tap("hook_pattern", pattern.to(v.dtype)) @ v

    def _sdpa(
        self,
        q: Float[torch.Tensor, "batch head pos d_head"],
        k: Float[torch.Tensor, "batch head key d_head"],
        v: Float[torch.Tensor, "batch head key d_head"],
        visible: Bool[torch.Tensor, "#batch 1 pos key"] | None,
    ) -> Float[torch.Tensor, "batch head pos d_head"]:
        q = self.score_scale(q)  # the scale belongs to the scores, but can be applied to q
        if visible is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        blind = ~visible.any(-1, keepdim=True)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind, scale=1.0)
        return z.masked_fill(blind, 0.0)


def visible_mean(
    v: Float[torch.Tensor, "batch head key d_head"],
    visible: Bool[torch.Tensor, "#batch 1 pos key"] | None,
) -> Float[torch.Tensor, "batch head pos d_head"]:
    """``sum_t U_qt v_t`` with U uniform over the keys that each row sees; zero where it sees none.

    Without a mask it is the same for all rows, and subtracting it centres the values: the fix
    ``A - (1/T) 1 1^T`` of Naderi et al. 2024 (arXiv 2410.07799).

    Args:
        v: values, of every head.
        visible: which keys each query sees; None for plain causal.
    """
    if visible is None:
        seen = torch.arange(1, v.shape[2] + 1, device=v.device, dtype=v.dtype)
        return v.cumsum(2) / seen[:, None]
    uniform = visible.to(v.dtype)
    return (uniform / uniform.sum(-1, keepdim=True).clamp_min(1)) @ v


class ScoreScale(nn.Module):
    """``w -> c w``: c = 1/sqrt(d_head), 1, calibrated to a standard deviation of 0.1, or learned.

    Menary et al. 2024 calibrate; a learned c is one inverse temperature per head, kept as its
    logarithm.
    """

    weight: torch.Tensor | None

    def __init__(self, cfg: QKVNormConfig) -> None:
        super().__init__()
        self.constant = cfg.d_head**-0.5 if cfg.score_scale == "inv_sqrt" else 1.0
        self.calibrated = Calibrated(0.1) if cfg.score_scale == "calibrated" else None
        start = torch.full((cfg.n_heads, 1, 1), cfg.d_head**-0.5).log()
        self.weight = nn.Parameter(start) if cfg.score_scale == "learned" else None

    def forward(
        self,
        x: Float[torch.Tensor, "batch head pos any"],
        where: Bool[torch.Tensor, "#batch 1 pos any"] | None = None,
    ) -> Float[torch.Tensor, "batch head pos any"]:
        """Multiply; `where` says which scores count when the scale is being calibrated."""
        if self.calibrated is not None:
            scaled: torch.Tensor = self.calibrated(x, where)
            return scaled
        if self.weight is not None:
            return x * self.weight.exp().to(x.dtype)
        return x if self.constant == 1.0 else x * self.constant
