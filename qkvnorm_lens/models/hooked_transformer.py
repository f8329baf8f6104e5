"""Our models as a ``HookedTransformer``, for users of TransformerLens 3.9.

The class was removed in TransformerLens 4.0, where `qkvnorm_lens.models.bridge` makes a
``TransformerBridge`` instead. Menary et al. 2024 (arXiv 2406.17837), Section 2, in the older terms:

    No-Norm     block.ln1 an identity
    Pre-Norm    block.ln1 the norm, its gains in the attention where q, k, v have separate ones
    QKV-Norm    block.ln1 an identity; hook_q, then the norm, then hook_q_normed; k and v alike

All hooks keep their old names, shapes and meaning: ``blocks.{l}.attn.hook_q`` is the projection's
output, ``hook_q_normed`` (``_k_``, ``_v_``) is [batch, pos, head, d_head] too.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float, Shaped
from torch import nn

from qkvnorm_lens.models.attention import head_norm, input_gain, shared_gain
from qkvnorm_lens.models.config import ARCHITECTURE, QKVNormConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qkvnorm_lens.models.model import QKVNormTransformer

AVAILABLE: Final = int(version("transformer-lens").split(".")[0]) < 4
"""Whether this TransformerLens has a ``HookedTransformer``."""

if AVAILABLE:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.components import (
        Attention,
        GroupedQueryAttention,
        LayerNorm,
        LayerNormPre,
        RMSNorm,
        RMSNormPre,
    )
    from transformer_lens.hook_points import HookPoint

    class _NormedVectors:
        """The placement's parts around the projections of TransformerLens's attention."""

        def add_norms(self: Any, cfg: QKVNormConfig) -> None:
            """Add the parts before and after W_Q, W_K and W_V, and their hook points."""
            self.q_gain, self.k_gain, self.v_gain = (input_gain(cfg) for _ in "qkv")
            self.q_norm, self.k_norm, self.v_norm = (head_norm(cfg, site) for site in "qkv")
            self.shared_gain = shared_gain(cfg)
            on = cfg.norm.on if cfg.norm is not None and cfg.placement == "qkv" else ""
            self.normed = {site: self.cfg.n_heads if site == "q" else cfg.n_kv for site in on}
            for site in self.normed:
                setattr(self, f"hook_{site}_normed", HookPoint())  # [batch, pos, head, d_head]

        def calculate_qkv_matrices(
            self: Any,
            query_input: Float[torch.Tensor, "batch pos *head d_model"],
            key_input: Float[torch.Tensor, "batch pos *kv_head d_model"],
            value_input: Float[torch.Tensor, "batch pos *kv_head d_model"],
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """q, k, v as they enter the dot product and the average, before rotary positions."""
            q, k, v = super().calculate_qkv_matrices(  # type: ignore[misc]
                self.q_gain(query_input), self.k_gain(key_input), self.v_gain(value_input)
            )
            return self._norm("q", q), self._norm("k", k), self._norm("v", v)

        def _norm(
            self: Any, site: str, x: Float[torch.Tensor, "batch pos head d_head"]
        ) -> Float[torch.Tensor, "batch pos head d_head"]:
            if site not in self.normed:
                return x
            norm, hook = getattr(self, f"{site}_norm"), getattr(self, f"hook_{site}_normed")
            # With ungroup_grouped_query_attention each key/value head comes several times over.
            x = x.unflatten(2, (self.normed[site], -1)).transpose(2, 3)
            x = self.shared_gain(norm(x)).transpose(2, 3).flatten(2, 3)
            shown: torch.Tensor = hook(x)
            return shown

        def forward(
            self: Any,
            *args: Any,
            attention_mask: Shaped[torch.Tensor, "batch key"] | None = None,
            **kwargs: Any,
        ) -> torch.Tensor:
            """TransformerLens's own, but padding is masked in bidirectional attention too."""
            if attention_mask is not None and self.cfg.attention_dir == "bidirectional":
                masked = torch.zeros(attention_mask.shape, device=attention_mask.device)
                masked = masked.masked_fill(~attention_mask.bool(), -torch.inf)
                kwargs["additive_attention_mask"] = masked[:, None, None, :]
            out: torch.Tensor = super().forward(  # type: ignore[misc]
                *args, attention_mask=attention_mask, **kwargs
            )
            return out

    class _NormedAttention(_NormedVectors, Attention):  # type: ignore[misc]
        pass

    class _NormedGroupedQueryAttention(_NormedVectors, GroupedQueryAttention):  # type: ignore[misc]
        pass

    class QKVNormHookedTransformer(HookedTransformer):  # type: ignore[misc]
        """A ``HookedTransformer`` with No-Norm, Pre-Norm or QKV-Norm attention.

        Made by `to_hooked_transformer`. Menary et al. 2024, Section 2.

        Args:
            cfg: the configuration; `cfg` of the model is TransformerLens's own.
            tokenizer: for `to_tokens`, `generate` and the like.
            device: where the weights go.
        """

        def __init__(
            self,
            cfg: QKVNormConfig,
            tokenizer: PreTrainedTokenizerBase | None,
            device: torch.device,
        ) -> None:
            with warnings.catch_warnings():
                # Who calls to_hooked_transformer knows that the class is on its way out.
                warnings.filterwarnings("ignore", "HookedTransformer is deprecated")
                super().__init__(hooked_config(cfg, device), tokenizer, move_to_device=False)
            self.qkvnorm_cfg = cfg
            for layer, block in enumerate(self.blocks):
                block.ln1 = _ln1(cfg, self.cfg)
                grouped = self.cfg.n_key_value_heads is not None
                attention = _NormedGroupedQueryAttention if grouped else _NormedAttention
                block.attn = attention(self.cfg, block.attn.attn_type, layer)
                block.attn.add_norms(cfg)
            self.to(cfg.dtype, print_details=False)
            self.move_model_modules_to_device()
            self.setup()  # names the new hook points

        def load_and_process_state_dict(self, *args: Any, **kwargs: Any) -> None:
            """Refused: folding assumes norms in other places, and would change the model."""
            raise NotImplementedError(
                "weight processing assumes a norm before each block's readers and none after "
                f"a projection; wanted a plain load_state_dict for placement "
                f"{self.qkvnorm_cfg.placement!r}, got load_and_process_state_dict (which "
                "process_weights_ calls)"
            )

    def _ln1(cfg: QKVNormConfig, hooked_cfg: Any) -> nn.Module:
        if cfg.placement != "pre" or cfg.norm is None:
            return nn.Identity()
        with_gain = cfg.norm.gains == "shared"
        if cfg.norm.kind == "rms":
            norm: nn.Module = RMSNorm(hooked_cfg) if with_gain else RMSNormPre(hooked_cfg)
        else:
            norm = LayerNorm(hooked_cfg) if with_gain else LayerNormPre(hooked_cfg)
        return norm


def hooked_config(cfg: QKVNormConfig, device: torch.device | str | None = None) -> Any:
    """TransformerLens 3.9's own configuration of one of our models.

    Args:
        cfg: ours.
        device: where the weights will be; None for TransformerLens's choice.

    Returns: A ``HookedTransformerConfig``. Its `seed` is None, since it would set the global random
        state; positions "none" are learned ones that stay zero.

    Raises:
        ImportError: TransformerLens 4 or later.
        ValueError: something that a ``HookedTransformer`` cannot express.
    """
    _need_3_9()
    _refuse_inexpressible(cfg)
    positions = cfg.positional_embedding_type
    window = cfg.window_size is not None
    return HookedTransformerConfig(
        **{name: getattr(cfg, name) for name in _SAME_FIELDS},
        positional_embedding_type="rotary" if positions == "rotary" else "standard",
        use_attn_scale=cfg.score_scale == "inv_sqrt",
        use_local_attn=window,
        attn_types=["local"] * cfg.n_layers if window else None,
        original_architecture=ARCHITECTURE,
        init_weights=False,
        device=None if device is None else str(device),
    )


def to_hooked_transformer(
    model: QKVNormTransformer, tokenizer: PreTrainedTokenizerBase | None = None
) -> Any:
    """Make a ``HookedTransformer`` of one of our models, with a copy of the weights.

    Biases that the model does not have are zero there, and do not train. For the placements see
    Menary et al. 2024, Section 2.

    Args:
        model: the plain module, which is left as it is.
        tokenizer: for `to_tokens`, `generate` and the like; None for the model's own, if it has
            one.

    Returns:
        A ``HookedTransformer``, in the mode (training or eval) of `model`.

    Raises:
        ImportError: TransformerLens 4 or later.
        ValueError: something that a ``HookedTransformer`` cannot express.
    """
    _need_3_9()
    _refuse_inexpressible(model.cfg)
    tokenizer = tokenizer if tokenizer is not None else model.tokenizer
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is not None:  # TransformerLens reads it again from where it came from
            tokenizer.save_pretrained(folder)
            tokenizer = type(tokenizer).from_pretrained(folder)
        hooked = QKVNormHookedTransformer(model.cfg, tokenizer, device)
    weights = _old_names(model)
    with torch.no_grad():
        for name, parameter in hooked.named_parameters():
            if name in weights:
                parameter.copy_(weights.pop(name))
            else:  # a bias, or positions, that our model does not have
                parameter.zero_().requires_grad_(False)
    assert not weights, f"no place for {sorted(weights)}"
    return hooked.train(model.training)


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """A saved model (or a shipped one, `checkpoints.checkpoint_path`) as a ``HookedTransformer``.

    Args:
        folder: a directory that `save_pretrained` wrote, or a hub id.
        device: where to put it.
        dtype: a dtype other than the saved one.
        attn_implementation: ``"eager"`` for a model saved with ``"sdpa"``.

    Raises:
        ImportError: TransformerLens 4 or later.
        FileNotFoundError: the directory lacks a file.
        ValueError: a configuration that is not ours, or that a ``HookedTransformer`` cannot
            express.
    """
    _need_3_9()
    from qkvnorm_lens.models.model import QKVNormTransformer

    plain = QKVNormTransformer.from_pretrained(
        os.fspath(folder), attn_implementation=attn_implementation
    )
    plain.to(device=device, dtype=dtype)
    plain.cfg.dtype = next(plain.parameters()).dtype
    return to_hooked_transformer(plain.eval())


_SAME_FIELDS: Final = (
    "n_layers", "d_model", "n_ctx", "d_head", "n_heads", "n_key_value_heads", "d_mlp", "d_vocab",
    "act_fn", "attn_only", "eps", "normalization_type", "attention_dir", "window_size",
    "rotary_base", "rotary_dim", "rotary_adjacent_pairs", "initializer_range", "dtype",
    "model_name", "default_prepend_bos", "tokenizer_prepends_bos",
)  # fmt: skip


def _need_3_9() -> None:
    if not AVAILABLE:
        raise ImportError(
            "a HookedTransformer needs transformer-lens 3.9, the last release that has one, got "
            f"{version('transformer-lens')}; there, use qkvnorm_lens.to_bridge or from_pretrained, "
            "which give a TransformerBridge"
        )


def _refuse_inexpressible(cfg: QKVNormConfig) -> None:
    """Refuse the first option that ``HookedTransformer`` has no part for."""
    positions = cfg.positional_embedding_type in ("standard", "rotary", "none")
    windows = cfg.window_size is None or cfg.attention_dir == "causal"
    wanted: tuple[tuple[str, bool, str], ...] = (
        ("output_mlp", not cfg.output_mlp, "()"),
        ("calibrated", not cfg.calibrated, "False"),
        ("centred", not cfg.centred, "False"),
        ("skip", cfg.skip == "both", "'both'"),
        ("score_scale", cfg.score_scale in ("inv_sqrt", "none"), "'inv_sqrt' or 'none'"),
        ("positional_embedding_type", positions, "'standard', 'rotary' or 'none'"),
        ("attn_implementation", cfg.attn_implementation == "eager", "'eager'"),
        ("window_size", windows, "None under attention_dir='bidirectional'"),
    )
    for name, fits, choices in wanted:
        if not fits:
            got = getattr(cfg, name)
            raise ValueError(f"{name}: a HookedTransformer wants {choices}, got {got!r}")


def _old_names(model: QKVNormTransformer) -> dict[str, torch.Tensor]:
    """Our weights under HookedTransformer's names and in its shapes ([head, d_model, d_head])."""
    cfg = model.cfg
    grouped = "_" if cfg.n_key_value_heads is not None else ""
    weights: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "tok_embed.weight":
            weights["embed.W_E"] = value
        elif name == "pos.weight":
            weights["pos_embed.W_pos"] = value
        elif name == "head.weight":
            weights["unembed.W_U"] = value.T
        elif name.startswith("ln_out."):
            weights[f"ln_final.{name.removeprefix('ln_out.')[0]}"] = value
        else:
            _, layer, part, rest = name.split(".", 3)
            at = f"blocks.{layer}."
            if part in ("ln1", "ln2"):
                weights[f"{at}{part}.{rest[0]}"] = value  # weight -> w, bias -> b
            elif part == "mlp":
                side = "in" if rest.startswith("fc_in") else "out"
                matrix = rest.endswith("weight")
                weights[f"{at}mlp.{'W' if matrix else 'b'}_{side}"] = value.T if matrix else value
            else:
                weights |= _attention_weights(f"{at}attn.", rest, value, cfg.d_head, grouped)
    return weights


def _attention_weights(
    at: str, name: str, value: torch.Tensor, d_head: int, grouped: str
) -> dict[str, torch.Tensor]:
    """One of the attention's weights; the norms keep their names."""
    site, _, kind = name.partition(".")
    if site == "o":
        whole = kind == "bias"
        return {f"{at}b_O": value} if whole else {f"{at}W_O": value.T.unflatten(0, (-1, d_head))}
    if site not in ("q", "k", "v"):
        return {f"{at}{name}": value}
    prefix = grouped if site != "q" else ""
    heads = value.unflatten(0, (-1, d_head))
    if kind == "bias":
        return {f"{at}{prefix}b_{site.upper()}": heads}
    return {f"{at}{prefix}W_{site.upper()}": heads.transpose(1, 2)}
