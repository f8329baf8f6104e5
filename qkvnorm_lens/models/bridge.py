"""Our models as TransformerLens models: the architecture that the entry point registers.

A bridge made here has TransformerLens's hook points and shapes, and in each attention

    hook_q, hook_k, hook_v                          the projections' outputs
    hook_q_normed, hook_k_normed, hook_v_normed     after QKV-Norm's norm, where there is one
    hook_rot_q, hook_rot_k                          after rotary positions
    hook_attn_scores                                pre-softmax, masked = -inf; edits land
    hook_pattern                                    edits land
    hook_z                                          the heads' outputs

On sdpa no scores and pattern exist; asking for a hook there raises, and so does asking for a
TransformerLens hook that our attention does not have.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from hooks.arguments import (
    brief,
    check_choice,
    check_device,
    check_dtype,
    check_kind,
    check_path,
    naming,
)
from qkvnorm_lens.models.config import ARCHITECTURE, QKVNormConfig

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

    from qkvnorm_lens.models.model import QKVNormTransformer

_EAGER_ONLY: Final = ("hook_attn_scores", "hook_pattern")
_ABSENT: Final = {  # by the end of the name
    "hook_result": "no head's result is made; wanted attn.hook_z, times the head's W_O",
    "hook_attn_in": "no head has an input of its own; wanted attn.hook_in or hook_resid_pre",
    **{
        f"hook_{s}_input": f"no head has an input of its own; wanted attn.{s}.hook_in"
        for s in "qkv"
    },
}


class QKVNormAttentionBridge(AttentionBridge):
    """Shows the attention's intermediate values through hook points; edits land."""

    supports_split_qkv_fork = False

    def __init__(self, cfg: QKVNormConfig) -> None:
        parts: dict[str, GeneralizedComponent] = {n: LinearBridge(name=n) for n in "qkvo"}
        parts |= {n: GeneralizedComponent(name=n) for n in _parts_with_state(cfg)}
        super().__init__(name="attn", config=cfg, submodules=parts)
        for name in ("hook_hidden_states", "hook_result"):  # fire in no attention of ours
            self._drop(name)
        if cfg.attn_implementation == "sdpa":
            for name in _EAGER_ONLY:
                self._drop(name)
        if cfg.norm is not None and cfg.placement == "qkv":
            for site in cfg.norm.on:
                setattr(self, f"hook_{site}_normed", HookPoint())

    def _drop(self, name: str) -> None:
        """Drop a hook point that never fires: it would silently accept hooks."""
        delattr(self, name)
        self._hook_registry.pop(name, None)

    def setup_hook_compatibility(self) -> None:
        """Give q, k, v and z an axis for heads; the rotated q and k already have it."""
        super().setup_hook_compatibility()
        for name in ("hook_rot_q", "hook_rot_k"):
            point = self._modules.get(name)
            if isinstance(point, HookPoint):
                point.hook_conversion = None

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run the attention with its values shown to the hooks."""
        x = self.hook_in(hidden_states)
        assert self.original_component is not None  # the bridge sets it before any forward
        out: torch.Tensor = self.hook_out(self.original_component(x, tap=self._tap, **kwargs))
        return out

    def _tap(self, name: str, value: torch.Tensor) -> torch.Tensor:
        shown: torch.Tensor = getattr(self, name)(value)
        return shown


class QKVNormArchitectureAdapter(ArchitectureAdapter):
    """Says which of our modules is which of TransformerLens's components.

    Weight processing assumes a norm before every reader and none after a projection, which
    holds for no placement here, so compatibility mode is refused rather than allowed to change the
    model.
    """

    supports_compatibility_mode = False
    supports_hf_output_attentions = False

    def __init__(self, cfg: Any) -> None:
        if int(version("transformer-lens").split(".")[0]) < 4:
            raise ImportError(
                f"a TransformerBridge of {ARCHITECTURE} needs transformer-lens 4 (tested with 4.0 "
                f"to 4.3), got {version('transformer-lens')}; on 3.9 make a HookedTransformer: "
                "qkvnorm_lens.models.hooked_transformer.to_hooked_transformer"
            )
        if not isinstance(cfg, QKVNormConfig):
            raise TypeError(f"cfg: wanted a QKVNormConfig; got {type(cfg).__name__}")
        super().__init__(cfg)
        self.supports_generation = cfg.attention_dir == "causal"
        self.supports_causal_loss = cfg.attention_dir == "causal"
        self.component_mapping = _component_mapping(cfg)

    def prepare_model(self, model: Any) -> None:
        """Refuse a module that is not ours."""
        from qkvnorm_lens.models.model import QKVNormTransformer

        if not isinstance(model, QKVNormTransformer):
            raise TypeError(f"model: wanted a QKVNormTransformer; got {type(model).__name__}")

    def setup_hook_compatibility(self, bridge: Any) -> None:
        """Answer a request for a hook that our models do not have with the reason."""
        sdpa = self.cfg.attn_implementation == "sdpa"

        def check(*names: str) -> None:
            for name in names:
                if sdpa and name.endswith(_EAGER_ONLY):
                    raise ValueError(
                        f"{name}: sdpa makes no scores and no pattern; wanted a model with "
                        'attn_implementation="eager"'
                    )
                reason = _ABSENT.get(name.rpartition(".")[2])
                if reason is not None:
                    raise ValueError(f"{name}: {reason}")

        object.__setattr__(bridge, "_check_hook_fireable", check)


def _parts_with_state(cfg: QKVNormConfig) -> list[str]:
    """The attention's parts with weights: a bridge loses the state of undeclared parts."""
    parts: list[str] = []
    if cfg.norm is not None and cfg.placement == "pre" and cfg.norm.gains == "separate":
        parts += ["q_gain", "k_gain", "v_gain"]
    if cfg.norm is not None and cfg.placement == "qkv" and cfg.norm.gains == "separate":
        parts += [f"{site}_norm" for site in cfg.norm.on]
    if cfg.norm is not None and cfg.placement == "qkv" and cfg.norm.gains == "shared":
        parts += ["shared_gain"]
    if cfg.calibrated:
        parts += ["q_scale", "k_scale", "v_scale", "update_scale"]
    if cfg.score_scale in ("learned", "calibrated"):
        parts += ["score_scale"]
    return parts


def _component_mapping(cfg: QKVNormConfig) -> dict[str, GeneralizedComponent]:
    submodules: dict[str, GeneralizedComponent] = {
        "ln1": _ln1(cfg),
        "attn": QKVNormAttentionBridge(cfg),
    }
    if not cfg.attn_only:
        submodules["ln2"] = _plain_norm("ln2", cfg)
        inner: dict[str, GeneralizedComponent] = {
            "in": LinearBridge(name="fc_in"),
            "out": LinearBridge(name="fc_out"),
        }
        submodules["mlp"] = MLPBridge(name="mlp", config=cfg, submodules=inner)
    blocks = BlockBridge(name="layers", config=cfg, submodules=submodules)
    absent = {"hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input"}
    if cfg.attn_only:
        absent |= {"hook_resid_mid", "hook_mlp_out"}
    blocks.hook_aliases = {k: v for k, v in blocks.hook_aliases.items() if k not in absent}
    mapping: dict[str, GeneralizedComponent] = {"embed": EmbeddingBridge(name="tok_embed")}
    if cfg.positional_embedding_type in ("standard", "sinusoidal"):
        mapping["pos_embed"] = PosEmbedBridge(name="pos")
    mapping["blocks"] = blocks
    mapping["ln_final"] = _plain_norm("ln_out", cfg)
    if cfg.output_mlp:
        mapping["output_mlp"] = GeneralizedComponent(name="out_mlp", config=cfg)
    mapping["unembed"] = UnembeddingBridge(name="head")
    return mapping


def _ln1(cfg: QKVNormConfig) -> GeneralizedComponent:
    if cfg.placement != "pre" or cfg.norm is None:
        return GeneralizedComponent(name="ln1", config=cfg)
    return _WeightlessOrNot(name="ln1", config=cfg, uses_rms_norm=cfg.norm.kind == "rms")


class _WeightlessOrNot(NormalizationBridge):
    """TransformerLens's norm, for one whose gain may come after it (``q_in``), not in it."""

    property_aliases: dict[str, str] = {}  # noqa: RUF012 - TransformerLens declares it so

    def _apply_weight_and_bias(
        self, hidden_states: torch.Tensor, input_dtype: torch.dtype
    ) -> torch.Tensor:
        x = hidden_states.to(input_dtype)
        weight = getattr(self.original_component, "weight", None)
        return x if weight is None else x * weight


def _plain_norm(name: str, cfg: QKVNormConfig) -> GeneralizedComponent:
    if cfg.normalization_type is None:
        return GeneralizedComponent(name=name, config=cfg)
    if cfg.normalization_type == "RMS":
        return RMSNormalizationBridge(name=name, config=cfg)
    return NormalizationBridge(name=name, config=cfg, uses_rms_norm=False)


def to_bridge(
    model: QKVNormTransformer, tokenizer: PreTrainedTokenizerBase | None = None
) -> TransformerBridge:
    """Wrap a model into a ``TransformerBridge``; the model is changed in place and belongs to it.

    Args:
        model: the plain module.
        tokenizer: for `to_tokens`, `generate` and the like; None for the model's own, if it has
            one.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    from qkvnorm_lens.models.model import QKVNormTransformer

    check_kind("model", model, QKVNormTransformer, "a QKVNormTransformer")
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise TypeError(f"tokenizer: wanted a tokenizer of transformers; got {brief(tokenizer)}")
    tokenizer = tokenizer if tokenizer is not None else model.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is not None:  # TransformerLens reads it again from where it came from
            tokenizer.save_pretrained(folder)
            tokenizer = type(tokenizer).from_pretrained(folder)
        bridge: TransformerBridge = build_bridge_from_module(
            model,
            ARCHITECTURE,
            tl_config=model.cfg,
            tokenizer=tokenizer,
            model_name=model.cfg.model_name,
        )
    return bridge


def to_plain(bridge: TransformerBridge) -> QKVNormTransformer:
    """The plain module again, with a copy of the bridge's weights and its tokenizer.

    Raises:
        TypeError: not a bridge around one of our models.
    """
    from qkvnorm_lens.models.model import QKVNormTransformer

    cfg = getattr(bridge, "cfg", None)
    if not isinstance(cfg, QKVNormConfig):
        got = f"architecture {a!r}" if (a := getattr(cfg, "architecture", None)) else brief(bridge)
        raise TypeError(f"bridge: wanted one made by to_bridge; got {got}")
    plain = QKVNormTransformer(cfg)
    weights = {name: _behind_bridges(bridge.original_model, name) for name in plain.state_dict()}
    plain.to(next(iter(weights.values())).device)
    plain.load_state_dict(weights)
    plain.tokenizer = bridge.tokenizer
    return plain


def _behind_bridges(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of this name in a model whose modules bridges have replaced."""
    current: Any = model
    for part in name.split("."):
        if isinstance(current, GeneralizedComponent):
            current = current.original_component
        current = getattr(current, part)
    value: torch.Tensor = current.detach()
    return value


def save_pretrained(
    model: TransformerBridge | QKVNormTransformer, folder: str | os.PathLike[str]
) -> None:
    """Write ``model.safetensors``, ``config.json`` and the tokenizer, for `from_pretrained`."""
    from qkvnorm_lens.models.model import QKVNormTransformer

    where = check_path("folder", folder)
    if not isinstance(getattr(model, "cfg", None), QKVNormConfig):
        raise TypeError(f"model: wanted one of ours, or its bridge; got {type(model).__name__}")
    plain = model if isinstance(model, QKVNormTransformer) else to_plain(model)
    with naming("folder", "a directory that can be written", where):
        plain.write(where)


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> TransformerBridge:
    """A saved model from a directory or the Hugging Face hub, with its tokenizer, in eval mode.

    Args:
        folder: a directory that `save_pretrained` wrote, or a hub id.
        device: where to put it.
        dtype: a dtype other than the saved one.
        attn_implementation: ``"eager"`` or ``"sdpa"``, if not as saved.

    Raises:
        FileNotFoundError: the directory lacks a file.
        ValueError: a configuration that is not one of ours.
    """
    from qkvnorm_lens.models.model import QKVNormTransformer

    where = check_path("folder", folder)
    device, dtype = check_device("device", device), check_dtype("dtype", dtype)
    if attn_implementation is not None:
        check_choice("attn_implementation", attn_implementation, ("eager", "sdpa"))
    try:
        plain = QKVNormTransformer.from_pretrained(
            str(where), attn_implementation=attn_implementation
        )
    except OSError as error:  # of huggingface_hub too, in many sentences
        said = " ".join(str(error).split())
        raise FileNotFoundError(
            "folder: wanted a directory that save_pretrained wrote, or the id of one on the hub; "
            f"got {brief(str(where))}: {said:.300}"
        ) from error
    return to_bridge(plain.to(device=device, dtype=dtype).eval())
