"""A tiny random model of each architecture that TransformerLens knows, built offline.

    built = build("Qwen3ForCausalLM", "gqa")
    args, kwargs = built.inputs(batch=3, pos=13)
    logits = built.model(*args, **kwargs)

As in `models.py` queries and keys are enlarged so that sparse attention rows exist, and
everything that has a weight has a random one, so that nothing is a no-op by accident.
`families.py` has the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers.pytorch_utils import Conv1D

from qkvnorm_lens.models.config import ARCHITECTURE as OURS, QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support.families import (
    BY_HEADS,
    CONFIGS,
    D_HEAD,
    D_MLP,
    D_MODEL,
    KINDS,
    LOADED_AS,
    N_CTX,
    N_HEADS,
    N_LAYERS,
    NAMED,
    NOT_TRIED,
    SCORES,
    SIZES,
    VOCAB,
    WINDOW,
    WINDOWS,
)

ArchitectureAdapterFactory.discover_entry_points()  # our own is registered by one
ADAPTERS: dict[str, type] = dict(ArchitectureAdapterFactory._adapters)
NAMES = tuple(sorted(ADAPTERS, key=str.lower))
NATIVE = "TransformerLensNative"
HEADS = ("mha", "gqa", "mqa")
KV_HEADS = {"mha": N_HEADS, "gqa": N_HEADS // 2, "mqa": 1}


class NotTried(Exception):
    """This architecture cannot be built here; the message says why."""


@dataclass(frozen=True)
class Built:
    """A tiny model and what it takes to run it."""

    model: TransformerBridge
    hf: str
    inputs: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]


def adapter_of(name: str) -> type:
    """TransformerLens's adapter class for an architecture name."""
    return ADAPTERS[name]


def groups() -> dict[str, tuple[str, ...]]:
    """One name for each kind of attention, and all names that it stands for.

    Names with the same adapter and the same configuration differ only in what is put on top.
    """
    found: dict[Any, list[str]] = {}
    for name in sorted(NAMES, key=lambda n: n in LOADED_AS):
        what = name if name in NOT_TRIED else _config_class(name)
        found.setdefault((ADAPTERS[name], what, str(NAMED.get(name))), []).append(name)
    return {names[0]: tuple(names) for names in found.values()}


def variants(name: str) -> tuple[str, ...]:
    """Which of multi-head, grouped-query and multi-query attention the family allows.

    Raises:
        NotTried: the class cannot be had here.
    """
    if name in (NATIVE, OURS):
        return HEADS
    cls: Any = _config_class(name)
    default = cls()
    for part in ("text_config", "encoder", "text_config"):  # T5Gemma 2 nests twice
        default = getattr(default, part, default)
    if type(default).__name__ in BY_HEADS:
        return tuple(BY_HEADS[type(default).__name__])
    fields = type(default).__dataclass_fields__
    grouped = "num_key_value_heads" in fields and not {"kv_lora_rank", "o_lora_rank"} & set(fields)
    return HEADS if grouped else ("mha",)


def preferred(name: str) -> str:
    """Grouped-query attention where the family has it."""
    allowed = variants(name)
    return "gqa" if "gqa" in allowed else allowed[-1]


def build(
    name: str,
    heads: str | None = None,
    *,
    seed: int = 0,
    attn: str = "eager",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Built:
    """A bridge in eval mode on the CPU.

    Args:
        name: one of `NAMES`.
        heads: one of ``variants(name)``; None for grouped-query where that exists.
        seed: of the weights; the global random state is left alone.
        attn: transformers' attention implementation.
        dtype: of the parameters.
        **options: fields of the configuration, over those of `families.py`.

    Raises:
        NotTried: the class cannot be had here.
    """
    hf = build_hf(name, heads, seed=seed, attn=attn, dtype=dtype, **options)
    own = isinstance(hf, (NativeModel, QKVNormTransformer))
    config = {"tl_config": hf.cfg} if own else {"hf_config": hf.config}
    inputs = _text(False) if own else _inputs(hf.config)
    # Splitting a fused qkv draws weights.
    with torch.random.fork_rng(devices=[]), _text_only(name):
        model = build_bridge_from_module(hf, name, **config)
    return Built(model.eval(), type(hf).__name__, inputs)


def build_hf(
    name: str,
    heads: str | None = None,
    *,
    seed: int = 0,
    attn: str = "eager",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """The model itself with the same weights, as a reference: a bridge changes its own in place."""
    allowed = variants(name)
    heads = heads or preferred(name)
    if heads not in allowed:
        raise ValueError(f"heads: {name} has {allowed}; got {heads!r}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if name in (NATIVE, OURS):
            model: Any = _own(name, heads, attn, **options)
        else:
            cls = _model_class(name)
            config = tiny_config(cls.config_class, heads, **NAMED.get(name, {}), **options)
            config.architectures = [name]
            with _text_only(name):
                model = cls(config)
            model.set_attn_implementation(attn)
        config = model.cfg if name in (NATIVE, OURS) else model.config
        kind = type(getattr(config, "text_config", config)).__name__
        _randomise(model, QK_SCALE * SCORES.get(kind, 1.0))
    for parameter in model.parameters():  # rotary frequencies stay float32, as in loading
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tiny_config(cls: Any, heads: str, **options: Any) -> Any:
    """A configuration with few of everything, nested ones too."""
    default = vars(cls())  # getattr refuses what differs between layers
    fields = cls.__dataclass_fields__
    own = CONFIGS.get(cls.__name__, {}) | BY_HEADS.get(cls.__name__, {}).get(heads, {}) | options
    numbers = SIZES | {"num_key_value_heads": KV_HEADS[heads]}
    chosen = {
        key: size
        for key, size in numbers.items()
        if key in fields and not isinstance(default.get(key), (list, tuple))
    }
    chosen |= {key: WINDOW for key in WINDOWS if key in fields and default.get(key)}
    kinds = {key: list(dict.fromkeys(default.get(key) or ())) for key in KINDS}
    kinds = {key: several for key, several in kinds.items() if several and key in fields}
    # Each kind of layer at least once, and the pattern twice where it is short.
    most = max(map(len, kinds.values()), default=1)
    layers = own.get("num_hidden_layers", N_LAYERS if most == 1 else max(4, most))
    chosen |= {key: (several * layers)[:layers] for key, several in kinds.items()}
    if "num_hidden_layers" in chosen:
        chosen["num_hidden_layers"] = layers
    for key in getattr(cls, "sub_configs", {}):
        nested = default.get(key)
        if nested is not None and hasattr(type(nested), "__dataclass_fields__"):
            chosen[key] = tiny_config(type(nested), heads)
    return cls(**(chosen | own))


def _model_class(name: str) -> Any:
    if name in NOT_TRIED:
        raise NotTried(NOT_TRIED[name])
    cls = getattr(transformers, LOADED_AS.get(name, name), None)
    if cls is None:
        raise NotTried(f"transformers {transformers.__version__} has no such class")
    return cls


def _config_class(name: str) -> Any:
    return name if name in (NATIVE, OURS) else _model_class(name).config_class


def _own(name: str, heads: str, attn: str, **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "d_model": D_MODEL,
        "d_head": D_HEAD,
        "n_heads": N_HEADS,
        "n_key_value_heads": KV_HEADS[heads],
        "n_layers": N_LAYERS,
        "d_mlp": D_MLP,
        "n_ctx": N_CTX,
        "d_vocab": VOCAB,
        "act_fn": "gelu",
        "positional_embedding_type": "rotary",
        "rotary_dim": D_HEAD,
        **options,
    }
    if name == OURS:
        sizes = {"placement": "qkv", **sizes}
        return QKVNormTransformer(QKVNormConfig(attn_implementation=attn, **sizes))
    cfg = TransformerBridgeConfig(**{"normalization_type": "LN", **sizes}, architecture=NATIVE)
    model = NativeModel(cfg)
    model.cfg = cfg
    return model


@contextmanager
def _text_only(name: str) -> Iterator[None]:
    """Do without libraries for images (torchvision, timm), which nothing here has."""
    adapter: Any = ADAPTERS[name]
    from_config: Any = transformers.AutoModel.from_config
    asked = [lib for lib in adapter.required_libraries if lib not in ("torchvision", "timm")]

    def without_timm(config: Any, **kwargs: Any) -> Any:
        tower = type(config).__name__ == "Gemma3nVisionConfig"
        return nn.Identity() if tower else from_config(config, **kwargs)

    with (
        mock.patch.object(adapter, "required_libraries", asked),
        mock.patch.object(transformers.AutoModel, "from_config", without_timm),
    ):
        yield


# --- weights ---------------------------------------------------------------------------------

QK_SCALE = 4.0
_QK_NORM = re.compile(r"\b(q|k|query|key)_?(layer)?_?norm(\.norms\.\d+)?\.weight$")
_QK = re.compile(
    r"(\b(q|k|query|key|c_attn|qkv|Wqkv|query_key_value|qkv_proj|q_proj|k_proj|kv_proj|q_b_proj|kv_b_proj)"
    r"(\.linear)?\.weight)$"
)


def _randomise(model: nn.Module, scores: float) -> None:
    """Unit variance out of every layer, scores about ``scores`` wide; norms and biases random."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            weight, full = parameter.data, f"{prefix}.{name}"
            if weight.ndim <= 1 or "norm" in type(module).__name__.lower():
                if _QK_NORM.search(full):  # only the norm's weight can enlarge a score
                    one_more = float(weight.abs().max() < 0.01)  # Gemma's: 1 + weight multiplies
                    weight.add_(one_more).mul_(scores**0.5).sub_(one_more)
                weight.add_(0.1 * torch.randn_like(weight))
                continue
            weight.copy_(torch.randn_like(weight) / _fan_in(module, weight) ** 0.5)
            if _QK.search(full):
                weight.mul_(scores**0.5)


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, Conv1D):
        return weight.shape[0]
    if isinstance(module, nn.Linear) or weight.ndim > 3:
        return weight[0].numel()
    return min(weight.shape[-2:])


# --- inputs ----------------------------------------------------------------------------------


def _inputs(config: Any) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    kind = type(config).__name__
    if kind in ("ViTConfig", "DeiTConfig"):
        return _array(lambda _: (config.num_channels, config.image_size, config.image_size))
    if kind == "ASTConfig":
        return _array(lambda _: (config.max_length, config.num_mel_bins))
    if kind in ("HubertConfig", "Wav2Vec2Config"):
        return _array(lambda pos: (4 * pos + 3,))  # two convolutions of width 3 and stride 2
    return _text(bool(config.is_encoder_decoder))


def _text(encoder_decoder: bool) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def inputs(
        batch: int = 1, pos: int = 13, seed: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``batch`` copies of one prompt; a decoder's is shorter, to tell the two apart."""
        generator = torch.Generator().manual_seed(seed)
        row = torch.randint(3, VOCAB, (2, pos), generator=generator)  # no special tokens
        tokens = row[:1].expand(batch, -1)
        if not encoder_decoder:
            return (tokens,), {}
        return (tokens,), {"decoder_input_ids": row[1:, : max(pos - 2, 2)].expand(batch, -1)}

    return inputs


def _array(
    shape: Callable[[int], tuple[int, ...]],
) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def inputs(
        batch: int = 1, pos: int = 13, seed: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``batch`` copies of one random picture, spectrogram or waveform."""
        generator = torch.Generator().manual_seed(seed)
        one = torch.randn(1, *shape(pos), generator=generator)
        return (one.expand(batch, *one.shape[1:]),), {}

    return inputs
