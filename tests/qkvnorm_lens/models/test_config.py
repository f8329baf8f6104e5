"""Configurations: what is valid, what is refused, and the sizes of the named ones."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from qkvnorm_lens.models.config import NAMED, NormSpec, QKVNormConfig, Sinusoids, named_config
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support.watching import shape_checks_off

SIZES: dict[str, Any] = {
    "d_model": 24,
    "d_head": 8,
    "n_heads": 4,
    "n_layers": 2,
    "n_ctx": 32,
    "d_vocab": 17,
    "d_mlp": 20,
}


@pytest.mark.parametrize(
    ("name", "millions"), [("baseline", 21.6), ("alternate", 17.4), ("large", 63.8)]
)
@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
def test_the_papers_models_have_the_papers_size(name: str, placement: Any, millions: float) -> None:
    with torch.device("meta"):
        model = QKVNormTransformer(named_config(name, placement, init_weights=False))
    n = sum(p.numel() for p in model.parameters())
    assert n / 1e6 == pytest.approx(millions, abs=0.15)


def test_the_papers_conventions() -> None:
    cfg = named_config("baseline", "qkv")
    assert cfg.norm == NormSpec("rms", "head", "separate", "qkv")
    assert cfg.n_heads * cfg.d_head == 768
    assert cfg.d_model == 512
    assert cfg.normalization_type == "LN"
    assert cfg.sinusoids == Sinusoids(32, (3.0, 1000.0), 50)
    assert cfg.calibrated
    assert cfg.score_scale == "calibrated"
    assert cfg.seed == 100
    assert named_config("baseline", "pre").norm == NormSpec("rms", "input", "separate", "qkv")
    assert named_config("baseline", "none").norm is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "post"}, r"placement: wanted one of \['none', 'pre', 'qkv'\]; got 'post'"),
        ({"placement": "none", "norm": NormSpec()}, "wanted None"),
        ({"placement": "pre", "norm": NormSpec(over="head")}, r"NormSpec\(over='input'\)"),
        ({"placement": "qkv", "norm": NormSpec(over="input")}, r"over='head'.*over='projection'"),
        (
            {"placement": "qkv", "norm": NormSpec(gains="shared"), "n_key_value_heads": 2},
            "as many key/value heads as heads",
        ),
        ({"n_key_value_heads": 3}, "a divisor of n_heads = 4; got 3"),
        ({"score_scale": "sqrt"}, "score_scale: wanted one of"),
        ({"score_scale": "calibrated", "attn_implementation": "sdpa"}, "wanted .*eager"),
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type: wanted one of"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 3}, "an even number up to"),
        ({"positional_embedding_type": "rotary", "rotary_dim": 16}, "up to d_head = 8; got 16"),
        ({"rotary_dim": 8}, 'positional_embedding_type="rotary"'),
        ({"sinusoids": Sinusoids(4)}, 'positional_embedding_type="sinusoidal"'),
        (
            {"positional_embedding_type": "sinusoidal", "sinusoids": Sinusoids(13)},
            "2 n <= d_model = 24",
        ),
        ({"attention_dir": "backward"}, "attention_dir: wanted one of"),
        ({"attn_implementation": "flash"}, "attn_implementation: wanted one of"),
        ({"act_fn": "solu"}, "act_fn: wanted one of"),
        ({"normalization_type": "RMSPre"}, "normalization_type: wanted one of"),
        ({"window_size": 0}, "window_size: wanted an integer >= 1; got 0"),
        ({"d_mlp": -1}, "d_mlp: wanted an integer >= 1"),
        ({"output_mlp": (0,)}, "output_mlp: wanted an integer >= 1"),
        ({"d_vocab_out": 3}, "d_vocab_out: wanted d_vocab = 17"),
        (
            {"use_qk_norm": True},
            "use_qk_norm: wanted the default False, as this architecture has no",
        ),
        ({"gated_mlp": True}, "gated_mlp: wanted the default False"),
        ({"attn_scores_soft_cap": 30.0}, "attn_scores_soft_cap: wanted the default"),
        ({"n_head": 4}, r"n_head: wanted one of the fields .* \(did you mean 'n_heads'\?\)"),
        ({"architecture": "GPT2LMHeadModel"}, "architecture: wanted 'QKVNormTransformer'"),
    ],
)
def test_invalid_combinations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QKVNormConfig(**{"placement": "pre", **SIZES, **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "batch"}, "NormSpec.kind: wanted one of"),
        ({"over": "token"}, "NormSpec.over: wanted one of"),
        ({"gains": "two"}, "NormSpec.gains: wanted one of"),
        ({"on": "kq"}, "NormSpec.on: wanted one of"),
        ({"over": "input", "on": "qk"}, 'wants on="qkv"'),
    ],
)
def test_invalid_norms_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormSpec(**arguments)


@pytest.mark.parametrize("arguments", [{"n": 0}, {"periods": (5.0, 3.0)}, {"max_shift": -1}])
def test_invalid_sinusoids_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(n|periods|max_shift): wanted .*; got"):
        Sinusoids(**arguments)


@pytest.mark.parametrize("name", sorted(NAMED))
@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
def test_json_round_trip(name: str, placement: Any) -> None:
    cfg = named_config(name, placement, dtype=torch.bfloat16, attn_bias=True)
    again = QKVNormConfig.from_json(json.loads(json.dumps(cfg.to_json())))
    assert {**vars(again)} == {**vars(cfg)}


def test_json_without_a_placement_is_refused() -> None:
    with pytest.raises(ValueError, match='wanted "placement"'):
        QKVNormConfig.from_json({"d_model": 8})


def test_copies_are_equal_and_apart() -> None:
    cfg = named_config("small", "qkv")
    copied = copy.deepcopy(cfg)
    copied.n_ctx = 5
    assert cfg.n_ctx != 5
    assert copied.norm == cfg.norm


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"name: wanted one of .*'baseline'.*got 'huge'"):
        named_config("huge", "pre")


def test_its_json_is_json() -> None:
    """Plain types, of which YAML, say, can make something too."""
    values = named_config("small", "pre").to_json()
    assert type(values["initializer_range"]) is float
    assert json.loads(json.dumps(values)) == values


def test_a_norm_of_another_type_is_refused() -> None:
    config = named_config("small", "qkv")
    values = {k: v for k, v in config.to_json().items() if k not in ("architecture", "dtype")}
    with shape_checks_off(), pytest.raises(TypeError, match=r"norm: wanted a NormSpec .* got \{"):
        QKVNormConfig(**values)
