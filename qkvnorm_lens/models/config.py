"""Configurations of No-Norm, Pre-Norm and QKV-Norm transformers.

TransformerLens's fields, and a few of ours. Menary et al. 2024 (arXiv 2406.17837): Section 2 for
the placements, the appendix on training for the sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, Literal, TypeVar, cast, get_args

import numpy as np
import torch
from transformer_lens.config import TransformerBridgeConfig

from hooks.arguments import (
    brief,
    check_booleans,
    check_integers,
    check_kind,
    check_number,
    near,
    read_list,
)
from qkvnorm_lens.models.fields import (
    HONOURED,
    MOST,
    check_fields,
    one_of,
    refuse_unknown,
    tl_defaults,
)

ARCHITECTURE: Final = "QKVNormTransformer"

Placement = Literal["none", "pre", "qkv"]
NormKind = Literal["rms", "layer"]
NormOver = Literal["input", "head", "projection"]
Gains = Literal["none", "shared", "separate"]
ScoreScale = Literal["inv_sqrt", "none", "calibrated", "learned"]
Skip = Literal["both", "attn", "mlp", "none"]
_Spec = TypeVar("_Spec")


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """The attention's norm: RMSNorm(z; g) = sqrt(n) g z / |z|; LayerNorm subtracts the mean first.

    Menary et al. 2024, Section 2.

    Args:
        kind: ``"rms"`` or ``"layer"`` (neither has a bias).
        over: the block's ``"input"`` (Pre-Norm), each ``"head"``, or the whole ``"projection"``
            (then all heads of a token share one factor, as in OLMo 2).
        gains: learned gains: ``"none"``, one ``"shared"`` by q, k and v, or ``"separate"`` ones.
        on: which of q, k and v are normed; ``"qk"`` is QK-norm.
    """

    kind: NormKind | str = "rms"
    over: NormOver | str = "head"
    gains: Gains | str = "separate"
    on: str = "qkv"

    def __post_init__(self) -> None:
        one_of("NormSpec.kind", self.kind, get_args(NormKind))
        one_of("NormSpec.over", self.over, get_args(NormOver))
        one_of("NormSpec.gains", self.gains, get_args(Gains))
        one_of("NormSpec.on", self.on, ("q", "k", "v", "qk", "qv", "kv", "qkv"))
        if self.over == "input" and self.on != "qkv":
            raise ValueError(
                f'NormSpec.on: a norm over the "input" wants on="qkv", for q, k and v read what it '
                f"gives; got {self.on!r}"
            )


@dataclasses.dataclass(frozen=True)
class Sinusoids:
    """Positions p -> (sin p f_i, cos p f_i) with trainable f_i, and a random shift of p.

    Menary et al. 2024, appendix on training. The first 2n components of the residual stream are
    used, the rest get zeros.

    Args:
        n: frequencies.
        periods: the shortest and the longest initial period; the others are log-spaced between.
        max_shift: in training, each sequence is shifted by one random integer from 0 to this.
    """

    n: int = 32
    periods: tuple[float, float] = (3.0, 1000.0)
    max_shift: int = 50

    def __post_init__(self) -> None:
        n, max_shift = check_integers(n=(self.n, 1, MOST), max_shift=(self.max_shift, 0, MOST))
        wanted = "two numbers, 0 < shortest <= longest"
        given = read_list("periods", self.periods, wanted)
        periods = tuple(check_number("periods", p, wanted, lambda x: 0 < x < np.inf) for p in given)
        if len(periods) != 2 or periods[0] > periods[1]:
            raise ValueError(f"periods: wanted {wanted}; got {brief(self.periods)}")
        for name, value in (("n", n), ("max_shift", max_shift), ("periods", periods)):
            object.__setattr__(self, name, value)


class QKVNormConfig(TransformerBridgeConfig):
    """A transformer with No-Norm, Pre-Norm or QKV-Norm attention (Menary et al. 2024, Section 2).

    Whatever TransformerLens has a field for is set by that field: sizes,
    `n_key_value_heads` (GQA, MQA), `attn_only`, `act_fn`, `eps`, `seed`, `dtype`, and

    - `normalization_type`: the norm of the feed-forward and of the output, under every placement:
      ``"LN"`` (with bias, the paper's), ``"RMS"`` or None;
    - `positional_embedding_type`: ``"standard"`` (learned), ``"sinusoidal"``, ``"rotary"`` (with
      `rotary_base`, `rotary_dim`, `rotary_adjacent_pairs`) or ``"none"``;
    - `attention_dir` ``"causal"`` or ``"bidirectional"``, and `window_size` for a sliding window (a
      token sees that many, itself included; bidirectionally, that many on either side);
    - `attn_implementation`: ``"eager"`` or ``"sdpa"`` (no scores or pattern exist there).

    Args:
        placement: where the attention's norm is.
        norm: this norm; None for the paper's (RMS, separate gains; per head for QKV-Norm).
        score_scale: w = c q.k with c = 1/sqrt(d_head), 1, calibrated once to a standard deviation
            of 0.1, or one learned per head.
        calibrated: the paper's other scales, fixed on the first batch: token embedding to a
            standard deviation of 0.5, the residual stream after it 1, the inputs of W_Q, W_K, W_V
            1, each attention update 0.05.
        attn_bias: biases on W_Q, W_K, W_V, W_O.
        centred: values are averaged with A - U instead of the pattern A, where U is uniform over
            each row's visible keys: this removes a rank-one part of A, and with it what all tokens
            have in common (Naderi et al. 2024, arXiv 2410.07799).
        skip: which updates are added to the residual stream; the others replace it (``"attn"``:
            the feed-forward's replaces it). Zuo & Guerzhoy 2024 (arXiv 2402.05969) ablate them.
        output_mlp: widths of hidden ReLU layers between the last norm and the unembedding.
        sinusoids: parameters of sinusoidal positions.
        **fields: TransformerLens's fields.

    Raises:
        ValueError: an invalid combination, or a field that this architecture does not have.
    """

    def __init__(
        self,
        *,
        placement: Placement | str,
        norm: NormSpec | None = None,
        score_scale: ScoreScale | str = "inv_sqrt",
        calibrated: bool = False,
        attn_bias: bool = False,
        centred: bool = False,
        skip: Skip | str = "both",
        output_mlp: Sequence[int] = (),
        sinusoids: Sinusoids | None = None,
        **fields: Any,
    ) -> None:
        # Types are wider than the choices, so that a wrong choice is answered here and by name.
        one_of("placement", placement, get_args(Placement))
        if fields.setdefault("architecture", ARCHITECTURE) != ARCHITECTURE:
            raise ValueError(
                f"architecture: wanted {ARCHITECTURE!r}; got {fields['architecture']!r}"
            )
        refuse_unknown(fields)
        check_fields(fields)
        calibrated, attn_bias = check_booleans(calibrated=calibrated, attn_bias=attn_bias)
        if sinusoids is not None:
            check_kind("sinusoids", sinusoids, Sinusoids, "a Sinusoids or None")
        widths = read_list("output_mlp", output_mlp, "a list of widths")
        fields.setdefault("attn_implementation", "eager")
        self.placement = cast(Placement, placement)
        self.norm = norm if norm is not None else _PAPER_NORM[self.placement]
        self.score_scale = cast(ScoreScale, score_scale)
        self.calibrated = calibrated
        self.attn_bias = attn_bias
        (self.centred,) = check_booleans(centred=centred)  # 1 == True
        self.skip = cast(Skip, skip)
        self.output_mlp = tuple(check_integers(output_mlp=(w, 1, MOST))[0] for w in widths)
        self.sinusoids = sinusoids
        super().__init__(**fields)
        if self.positional_embedding_type == "sinusoidal" and sinusoids is None:
            self.sinusoids = Sinusoids(n=min(32, self.d_model // 2))
        self.use_attn_scale = score_scale == "inv_sqrt"
        self._check_sizes()
        self._check_choices()
        self._check_norm()

    @property
    def n_kv(self) -> int:
        """Key/value heads."""
        return int(self.n_key_value_heads or self.n_heads)

    def _check_sizes(self) -> None:
        names = ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab", "d_mlp")
        for name in (*names, *(("window_size",) if self.window_size is not None else ())):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: wanted a positive integer; got {value!r}")
        if self.n_kv < 1 or self.n_heads % self.n_kv:
            raise ValueError(
                f"n_key_value_heads: wanted a divisor of n_heads = {self.n_heads}; got {self.n_kv}"
            )
        if self.d_vocab_out not in (-1, self.d_vocab):
            raise ValueError(
                f"d_vocab_out: wanted d_vocab = {self.d_vocab} (or -1); got {self.d_vocab_out}"
            )

    def _check_choices(self) -> None:
        one_of("score_scale", self.score_scale, get_args(ScoreScale))
        one_of("skip", self.skip, get_args(Skip))
        if self.sinusoids is not None:
            if self.positional_embedding_type != "sinusoidal":
                raise ValueError(
                    'sinusoids: wanted positional_embedding_type="sinusoidal" with them; got '
                    f"{self.positional_embedding_type!r}"
                )
            if 2 * self.sinusoids.n > self.d_model:
                raise ValueError(
                    f"sinusoids: wanted 2 n <= d_model = {self.d_model}; got n = {self.sinusoids.n}"
                )
        turned = self.rotary_dim if self.rotary_dim is not None else self.d_head
        if self.positional_embedding_type == "rotary":
            if turned % 2 or not 0 < turned <= self.d_head:
                raise ValueError(
                    f"rotary_dim: wanted an even number up to d_head = {self.d_head}; got {turned}"
                )
        elif self.rotary_dim is not None:
            raise ValueError(
                'rotary_dim: wanted positional_embedding_type="rotary" with it; got '
                f"{self.positional_embedding_type!r}"
            )
        if self.score_scale == "calibrated" and self.attn_implementation == "sdpa":
            raise ValueError(
                'attn_implementation: wanted "eager" with score_scale="calibrated", which measures '
                "the scores; got 'sdpa'"
            )

    def _check_norm(self) -> None:
        if self.norm is not None and not isinstance(self.norm, NormSpec):
            raise TypeError(
                f"norm: wanted a NormSpec or None (from_json reads a dict); got {brief(self.norm)}"
            )
        over = {"none": (), "pre": ("input",), "qkv": ("head", "projection")}[self.placement]
        if (self.norm is None) != (not over) or (self.norm and self.norm.over not in over):
            wanted = " or ".join(f"NormSpec(over={o!r})" for o in over) or "None"
            raise ValueError(
                f"norm: wanted {wanted} with placement {self.placement!r}; got {self.norm!r}"
            )
        shared = self.placement == "qkv" and self.norm is not None and self.norm.gains == "shared"
        if shared and self.n_kv != self.n_heads:
            raise ValueError(
                f"norm: wanted as many key/value heads as heads ({self.n_heads}) with gains shared "
                f"by q, k and v; got {self.n_kv}"
            )

    def to_json(self) -> dict[str, Any]:
        """What the constructor needs to make this configuration again, in JSON types."""
        defaults = tl_defaults()
        fields = {
            k: _plain(getattr(self, k))
            for k in sorted(HONOURED - {"device", "dtype"})
            if getattr(self, k) != defaults.get(k)
        }
        return {
            "architecture": ARCHITECTURE,
            "placement": self.placement,
            "norm": dataclasses.asdict(self.norm) if self.norm else None,
            "score_scale": self.score_scale,
            "calibrated": self.calibrated,
            "attn_bias": self.attn_bias,
            **_unless_default(centred=self.centred, skip=self.skip),
            "output_mlp": list(self.output_mlp),
            "sinusoids": dataclasses.asdict(self.sinusoids) if self.sinusoids else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            **fields,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> QKVNormConfig:
        """The configuration that `to_json` described.

        Raises:
            ValueError: unknown or missing fields, or an invalid combination.
        """
        check_kind("values", values, dict, "a dict, as to_json gives")
        values = dict(values)
        if "placement" not in values:
            raise ValueError(f'values: wanted "placement" among them; got {brief(list(values))}')
        if values.get("norm") is not None:
            values["norm"] = _made("norm", NormSpec, values["norm"])
        if values.get("sinusoids") is not None:
            values["sinusoids"] = _made("sinusoids", Sinusoids, values["sinusoids"])
        named = values.pop("dtype", "float32")
        dtype = getattr(torch, named, None) if isinstance(named, str) else None
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"dtype: wanted the name of a torch dtype such as 'float32'; got {brief(named)}"
            )
        for name in values:
            if not isinstance(name, str):
                raise TypeError(f"values: wanted names of fields; got {brief(name)}")
        return cls(dtype=dtype, **values)


def _made(name: str, kind: type[_Spec], values: Any) -> _Spec:
    """A part of a configuration from its dict."""
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    check_kind(name, values, dict, f"a dict with {', '.join(known)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}  # as JSON has
    strange = [key for key in values if key not in known]
    if strange:
        got = f"{brief(strange[0])}{near(strange[0], known)}"
        raise ValueError(f"{name}: wanted some of {known}; got {got}")
    return kind(**values)


_PAPER_NORM: Final[dict[Placement, NormSpec | None]] = {
    "none": None,
    "pre": NormSpec(over="input"),
    "qkv": NormSpec(over="head"),
}


def _plain(value: Any) -> Any:
    """Plain numbers: TransformerLens computes some defaults with NumPy."""
    return value.item() if isinstance(value, np.generic) else value


def _unless_default(*, centred: bool, skip: str) -> dict[str, Any]:
    """The two fields that older files lack, where they are not the default."""
    return ({"centred": True} if centred else {}) | ({"skip": skip} if skip != "both" else {})


_EVERY: Final[dict[str, Any]] = {"d_vocab": 17, "default_prepend_bos": False, "seed": 100}
_PAPER: Final[dict[str, Any]] = _EVERY | {
    "d_head": 64, "d_mlp": 512, "output_mlp": (512, 512), "n_ctx": 128,
    "positional_embedding_type": "sinusoidal", "score_scale": "calibrated", "calibrated": True,
}  # fmt: skip
_SMALL: Final = _EVERY | {"d_model": 128, "d_head": 32, "n_heads": 4, "d_mlp": 256, "n_ctx": 32}
NAMED: Final[dict[str, dict[str, Any]]] = {
    "baseline": {**_PAPER, "n_layers": 10, "d_model": 512, "n_heads": 12},
    "alternate": {**_PAPER, "n_layers": 8, "d_model": 512, "n_heads": 12},
    "large": {**_PAPER, "n_layers": 12, "d_model": 1024, "n_heads": 16},
    "small": {**_SMALL, "n_layers": 4},
    "study": {**_SMALL, "n_layers": 2, "d_model": 64, "d_head": 16, "d_mlp": 256},
    "language": {
        "d_vocab": 512, "default_prepend_bos": True, "n_layers": 4, "d_model": 96, "d_head": 32,
        "n_heads": 4, "d_mlp": 256, "n_ctx": 128, "positional_embedding_type": "rotary",
        "act_fn": "gelu",
    },
}  # fmt: skip


def named_config(name: str, placement: Placement | str, **changes: Any) -> QKVNormConfig:
    """A named configuration under one placement.

    The paper's three, ``"small"`` and ``"study"`` for addition, ``"language"`` for text.

    Args:
        name: one of ``NAMED``.
        placement: where the attention's norm is.
        **changes: fields to change.
    """
    one_of("name", name, sorted(NAMED))
    return QKVNormConfig(placement=placement, **{**NAMED[name], **changes})
