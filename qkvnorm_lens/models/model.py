"""The transformer around the attention: embeddings, blocks, output.

    x = E[token] + position     x <- x + Attn(n(x))     x <- x + FF(LN(x))    logits = U MLP(LN(x))

Menary et al. 2024 (arXiv 2406.17837), Section 2 and the appendix on training. The feed-forward and
the output keep their norm under every placement; only the attention's differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from jaxtyping import Bool, Float, Int, Shaped
from torch import nn

from hooks.arguments import check_kind
from qkvnorm_lens.models import files
from qkvnorm_lens.models.attention import Attention, KVCache, Rotation, block_norm, calibrated
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.files import CONFIG, TOKENIZER, WEIGHTS
from qkvnorm_lens.models.norms import Calibrated, Gain, Norm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def plain_norm(cfg: QKVNormConfig) -> nn.Module:
    """The norm of the feed-forward and of the output, which no placement changes."""
    if cfg.normalization_type is None:
        return nn.Identity()
    if cfg.normalization_type == "RMS":
        return Norm("rms", gain=(cfg.d_model,), eps=cfg.eps)
    return nn.LayerNorm(cfg.d_model, eps=cfg.eps)


class FeedForward(nn.Module):
    """``FF(x) = W_2 f(W_1 x + b_1) + b_2``."""

    def __init__(self, cfg: QKVNormConfig) -> None:
        super().__init__()
        assert cfg.d_mlp is not None  # TransformerLens fills it in
        self.fc_in = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.fc_out = nn.Linear(cfg.d_mlp, cfg.d_model)
        self.act = _ACTIVATIONS[cfg.act_fn]

    def forward(
        self, hidden_states: Float[torch.Tensor, "batch pos d_model"]
    ) -> Float[torch.Tensor, "batch pos d_model"]:
        """The feed-forward's update."""
        out: torch.Tensor = self.fc_out(self.act(self.fc_in(hidden_states)))
        return out


class Block(nn.Module):
    """``x <- x + Attn(n(x))``, then ``x <- x + FF(LN(x))``; without a skip, ``x <- Attn(n(x))``."""

    def __init__(self, cfg: QKVNormConfig, layer: int) -> None:
        super().__init__()
        self.ln1 = block_norm(cfg)
        self.attn = Attention(cfg, layer)
        self.attn_only = cfg.attn_only
        self.skip_attn, self.skip_mlp = (cfg.skip in ("both", name) for name in ("attn", "mlp"))
        if not cfg.attn_only:
            self.ln2 = plain_norm(cfg)
            self.mlp = FeedForward(cfg)

    def forward(
        self,
        hidden_states: Float[torch.Tensor, "batch pos d_model"],
        visible: Bool[torch.Tensor, "#batch 1 pos key"] | None = None,
        rotation: Rotation | None = None,
        past_key_values: KVCache | None = None,
    ) -> Float[torch.Tensor, "batch pos d_model"]:
        """The residual stream after this block."""
        x = hidden_states
        update = self.attn(
            self.ln1(x), visible=visible, rotation=rotation, past_key_values=past_key_values
        )
        x = x + update if self.skip_attn else update
        if not self.attn_only:
            update = self.mlp(self.ln2(x))
            x = x + update if self.skip_mlp else update
        out: torch.Tensor = x
        return out


class TokenEmbedding(nn.Embedding):
    """``E[token]``, scaled where the paper's scales are calibrated."""

    def __init__(self, cfg: QKVNormConfig) -> None:
        super().__init__(cfg.d_vocab, cfg.d_model)
        self.scale = calibrated(cfg, 0.5)

    def forward(self, input: Int[torch.Tensor, "batch pos"]) -> Float[torch.Tensor, "batch pos d"]:
        """Embed tokens."""
        out: torch.Tensor = self.scale(super().forward(input))
        return out


class SinusoidalPositions(nn.Module):
    """``p -> (sin p f_1, .., sin p f_n, cos p f_1, .., cos p f_n, 0, ..)`` with trainable f.

    Menary et al. 2024, appendix on training.
    """

    def __init__(self, cfg: QKVNormConfig) -> None:
        super().__init__()
        assert cfg.sinusoids is not None  # the configuration fills it in
        self.d_model = cfg.d_model
        self.sinusoids = cfg.sinusoids
        self.n_ctx = cfg.n_ctx
        self.frequencies = Gain(cfg.sinusoids.n)

    def start(self) -> None:
        """Set the frequencies to their log-spaced initial values."""
        low, high = (math.log(period) for period in self.sinusoids.periods)
        periods = torch.linspace(low, high, self.sinusoids.n, dtype=torch.float64).exp()
        with torch.no_grad():
            self.frequencies.weight.copy_(2 * math.pi / periods)

    @property
    def weight(self) -> Float[torch.Tensor, "n_ctx d_model"]:
        """All positions without a shift, which TransformerLens shows as ``W_pos``."""
        table: torch.Tensor = self(
            torch.arange(self.n_ctx, device=self.frequencies.weight.device)[None]
        )
        return table[0]

    def forward(
        self, position_ids: Int[torch.Tensor, "batch pos"]
    ) -> Float[torch.Tensor, "batch pos d_model"]:
        """Positions as vectors, in the parameters' dtype."""
        frequencies = self.frequencies.weight
        angle = position_ids[..., None].float() * frequencies.float()
        waves = torch.cat((angle.sin(), angle.cos()), -1)
        return F.pad(waves, (0, self.d_model - waves.shape[-1])).to(frequencies.dtype)


def rotation_at(cfg: QKVNormConfig, position_ids: Int[torch.Tensor, "batch pos"]) -> Rotation:
    """Angles ``p base^(-2i/n)`` of rotary positions, made for these positions only."""
    n = cfg.rotary_dim or cfg.d_head
    pair = torch.arange(0, n, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids[..., None, None].float() * cfg.rotary_base ** (-pair / n)
    return Rotation(angle.cos(), angle.sin(), bool(cfg.rotary_adjacent_pairs))


def visible_keys(
    cfg: QKVNormConfig,
    n_new: int,
    n_old: int,
    attention_mask: Shaped[torch.Tensor, "..."] | None,
    device: torch.device,
) -> Bool[torch.Tensor, "#batch 1 pos key"] | None:
    """Which keys each new token sees: direction, window, padding; None for sdpa's own mask.

    A mask with four axes replaces direction and window.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask.to(device)
    causal = cfg.attention_dir == "causal"
    plain = cfg.window_size is None and attention_mask is None and n_old == 0
    if cfg.attn_implementation == "sdpa" and causal and plain:
        return None
    key = torch.arange(n_old + n_new, device=device)
    back = key[n_old:, None] - key[None, :]
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    if cfg.window_size is not None:
        seen = seen & (back.abs() < cfg.window_size)
    seen = seen[None, None]
    return seen if attention_mask is None else seen & attention_mask[:, None, None, :].bool()


def _check_mask(mask: Shaped[torch.Tensor, "..."] | None) -> None:
    """Refuse a mask that `visible_keys` can't read.

    Raises:
        ValueError: neither [batch, key] nor a boolean [batch, 1, query, key].
    """
    if mask is None or mask.ndim == 2:
        return
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.dtype != torch.bool:
        raise ValueError(
            "attention_mask: wanted [batch, key], or booleans [batch, 1, query, key]; got "
            f"{list(mask.shape)} of {mask.dtype}"
        )


@dataclasses.dataclass
class CachedOutput:
    """Logits, and the keys and values with which to continue."""

    logits: Float[torch.Tensor, "batch pos d_vocab"]
    past_key_values: KVCache


class QKVNormTransformer(nn.Module, ModelHubMixin):
    """A decoder (or encoder) whose attention has No-Norm, Pre-Norm or QKV-Norm.

    Menary et al. 2024, Section 2. A plain module: fast to train, without hooks. `to_bridge` wraps
    it into a ``TransformerBridge``, which has them.

    Args:
        cfg: the configuration; weights are drawn from ``cfg.seed``, the global random state is left
            alone.
    """

    def __init__(self, cfg: QKVNormConfig) -> None:
        check_kind("cfg", cfg, QKVNormConfig, "a QKVNormConfig")
        super().__init__()
        self.cfg = cfg
        self.tokenizer: PreTrainedTokenizerBase | None = None
        # torch's modules draw weights that are then replaced
        with torch.random.fork_rng(devices=[]):
            self.tok_embed = TokenEmbedding(cfg)
            self.pos: nn.Module | None = None
            if cfg.positional_embedding_type == "standard":
                self.pos = nn.Embedding(cfg.n_ctx, cfg.d_model)
            elif cfg.positional_embedding_type == "sinusoidal":
                self.pos = SinusoidalPositions(cfg)
            self.stream_scale = calibrated(cfg, 1.0)
            self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
            self.ln_out = plain_norm(cfg)
            widths = (cfg.d_model, *cfg.output_mlp)
            hidden = ((nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths))
            self.out_mlp = nn.Sequential(*itertools.chain(*hidden))
            self.head = nn.Linear(widths[-1], cfg.d_vocab, bias=False)
        if cfg.init_weights:
            self._draw_weights()
        self.to(cfg.dtype)

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Normal weights, smaller by sqrt(2 layers) where they write into the residual stream."""
        cfg = self.cfg
        rng = torch.Generator().manual_seed(cfg.seed if cfg.seed is not None else 0)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.ndim == 2 and "norm" not in name and "gain" not in name:
                std = cfg.initializer_range
                if name.endswith(("attn.o.weight", "fc_out.weight")):
                    std = std / math.sqrt(2 * cfg.n_layers)
                elif name.startswith("out_mlp"):
                    std = math.sqrt(2 / p.shape[1])  # ReLU keeps half the variance
                p.copy_(torch.randn(p.shape, generator=rng) * std)
        if isinstance(self.pos, SinusoidalPositions):
            self.pos.start()

    def forward(
        self,
        input_ids: Int[torch.Tensor, "batch pos"] | None = None,
        attention_mask: Shaped[torch.Tensor, "..."] | None = None,
        position_ids: Int[torch.Tensor, "#batch pos"] | None = None,
        inputs_embeds: Float[torch.Tensor, "batch pos d_model"] | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        at: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Float[torch.Tensor, "..."] | CachedOutput:
        """Logits.

        Args:
            input_ids: tokens.
            attention_mask: 1 for tokens, 0 for padding, over the cached tokens too; or boolean
                ``[batch or 1, 1, query, key]``: the keys that each query sees, in place of the
                configuration's direction and window.
            position_ids: positions; None for 0, 1, .. from each row's first token that is not
                padding (shifted at random in training, where the positions are sinusoids).
            inputs_embeds: embedded tokens, in place of `input_ids`.
            past_key_values: earlier tokens' keys and values.
            use_cache: return keys and values too.
            at: rows and positions whose logits to return; None for all.

        Raises:
            ValueError: neither or both inputs, or more tokens than the context holds.
        """
        _check_mask(attention_mask)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: wanted either them or inputs_embeds; got both or neither")
        x = inputs_embeds if input_ids is None else self.tok_embed(input_ids)
        assert x is not None
        cache = (
            past_key_values if past_key_values is not None else (KVCache() if use_cache else None)
        )
        n_old = 0 if cache is None else len(cache)
        n_new = x.shape[1]
        if n_old + n_new > self.cfg.n_ctx:
            raise ValueError(
                f"input_ids: wanted at most n_ctx = {self.cfg.n_ctx} tokens; got {n_old + n_new}"
            )
        if position_ids is None:
            position_ids = self._positions(x, n_old, attention_mask)
        if self.pos is not None:
            x = x + self.pos(position_ids)
        x = self.stream_scale(x)
        rotary = self.cfg.positional_embedding_type == "rotary"
        rotation = rotation_at(self.cfg, position_ids) if rotary else None
        visible = visible_keys(self.cfg, n_new, n_old, attention_mask, x.device)
        for block in self.layers:
            x = block(x, visible=visible, rotation=rotation, past_key_values=cache)
        if at is not None:
            x = x[at]
        logits: torch.Tensor = self.head(self.out_mlp(self.ln_out(x)))
        return CachedOutput(logits, cache) if use_cache and cache is not None else logits

    def _positions(
        self,
        x: Float[torch.Tensor, "batch pos d_model"],
        n_old: int,
        attention_mask: Shaped[torch.Tensor, "..."] | None,
    ) -> Int[torch.Tensor, "#batch pos"]:
        """0, 1, .. from each row's first real token; sinusoids are shifted in training."""
        if attention_mask is None or attention_mask.ndim == 4:
            positions = torch.arange(n_old, n_old + x.shape[1], device=x.device)[None]
        else:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, n_old:]
        spec = self.cfg.sinusoids
        if self.training and spec is not None and spec.max_shift:
            shift = torch.randint(spec.max_shift + 1, (x.shape[0], 1), device=x.device)
            positions = positions + shift
        return positions

    def write(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write ``model.safetensors``, ``config.json`` and the tokenizer, if there is one.

        Args:
            folder: where to.
            dtype: of the weights in the file, which are read into the configuration's dtype.
        """
        values = self.cfg.to_json()
        if self.tokenizer is not None:
            files.write_tokenizer(self.tokenizer, folder)
        state = self.state_dict()
        files.write({k: v.to(dtype=dtype) for k, v in state.items()}, values, folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Called by huggingface_hub's `save_pretrained` and `push_to_hub`."""
        self.write(save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        attn_implementation: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **unused: Any,
    ) -> QKVNormTransformer:
        """Called by huggingface_hub's `from_pretrained`."""
        folder = Path(model_id)
        if not folder.is_dir():
            options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
            options |= {"force_download": force_download, "local_files_only": local_files_only}
            folder = Path(snapshot_download(model_id, **options))
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: wanted {name}, which save_pretrained writes")
        values, weights = files.read(folder)
        if attn_implementation is not None:
            values["attn_implementation"] = attn_implementation
        config = files.made(
            folder / CONFIG, lambda: QKVNormConfig.from_json({**values, "init_weights": False})
        )
        files.check_fits(folder / WEIGHTS, config, weights, cls)
        model = files.made(folder / CONFIG, lambda: cls(config))
        files.made(folder / WEIGHTS, lambda: model.load_state_dict(weights))
        model.cfg.init_weights = values.get("init_weights", True)  # it can make the start again
        if (folder / TOKENIZER).is_file():
            from transformers import PreTrainedTokenizerFast

            model.tokenizer = files.made(
                folder / TOKENIZER, lambda: PreTrainedTokenizerFast.from_pretrained(folder)
            )
        return model.eval()

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[None]:
        """Forward passes inside fix every calibrated scale, in the order of the pass.

        Menary et al. 2024, appendix on training: once, on the first batch.
        """
        scales = [m for m in self.modules() if isinstance(m, Calibrated)]
        for scale in scales:
            scale.measuring = True
        try:
            with torch.no_grad():
                yield
        finally:
            for scale in scales:
                scale.measuring = False


@torch.no_grad()
def fold_gains(model: QKVNormTransformer) -> QKVNormTransformer:
    """Multiply Pre-Norm's gains into the weights, the function unchanged: ``W (g * n) = (W g) n``.

    Exact for gains before a projection; after one (QKV-Norm), the norm would remove them again.

    Args:
        model: left as it is.

    Returns:
        A new model, whose configuration says ``gains="none"``.

    Raises:
        ValueError: gains that come after a projection.
    """
    norm = model.cfg.norm
    if model.cfg.placement == "qkv" and norm is not None and norm.gains != "none":
        raise ValueError(
            "gains behind a projection (QKV-Norm) cannot be folded into its weights; wanted "
            f'placement "pre" or "none", got {norm!r}'
        )
    bare = None if norm is None else dataclasses.replace(norm, gains="none")
    cfg = QKVNormConfig.from_json(
        {**model.cfg.to_json(), "norm": None if bare is None else dataclasses.asdict(bare)}
    )
    folded = QKVNormTransformer(cfg)
    weights = dict(model.state_dict())
    for layer in range(cfg.n_layers):
        at = f"layers.{layer}."
        common = weights.pop(f"{at}ln1.weight", None)
        for site in "qkv":
            gain = weights.pop(f"{at}attn.{site}_gain.weight", common)
            if gain is not None:
                name = f"{at}attn.{site}.weight"
                weights[name] = weights[name] * gain
    folded.load_state_dict(weights)
    folded.tokenizer = model.tokenizer
    return folded.to(next(model.parameters()).device).train(model.training)
