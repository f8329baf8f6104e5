"""Where a model keeps its vectors, found and proven on the model: tiny ones of several kinds."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import hooks
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import NormSpec, QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import builders, models
from tests.support.watching import RENAMED


def ours(**options: object) -> TransformerBridge:
    settings: dict[str, object] = {
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "d_head": 8,
        "d_mlp": 48,
        "d_vocab": 23,
        "n_ctx": 32,
        "act_fn": "relu",
        "seed": 3,
    }
    model = QKVNormTransformer(QKVNormConfig(**(settings | options)))
    with torch.no_grad():  # a random small model attends evenly: nothing would show
        for name, parameter in model.named_parameters():
            if ".q." in name or ".k." in name:
                parameter *= 3
    return to_bridge(model)


@pytest.mark.parametrize(
    ("kind", "dot", "shields", "bias"),
    [
        ("gpt2", "hook_q", ("none", "none", "none"), False),
        ("llama", "hook_rot_q", ("none", "none", "none"), False),
        ("bloom", "hook_q", ("none", "none", "none"), True),
        ("qwen3", "hook_rot_q", ("removed", "removed", "none"), False),
    ],
)
def test_sites_of_known_architectures(
    kind: str, dot: str, shields: tuple[str, ...], bias: bool
) -> None:
    model = models.TINY[kind]()
    sites = hooks.attention_sites(model)
    assert [site.layer for site in sites] == [0, 1]
    for site in sites:
        assert site.q.projection.hook == f"blocks.{site.layer}.attn.hook_q"
        assert site.q.dot.hook == f"blocks.{site.layer}.attn.{dot}"
        assert (site.q.shield, site.k.shield, site.v.shield) == shields
        assert site.has_bias is bias
        assert site.scores_editable
        assert not site.tapped
        assert site.score_scale == pytest.approx([8**-0.5] * 4, rel=1e-3)
        group = site.n_heads // site.n_kv_heads
        assert site.kv_head_of == tuple(h // group for h in range(4))
    frame = sites.to_frame()
    assert list(frame["vector"]) == ["q", "k", "v"] * 2
    assert set(frame["z"]) <= set(model.hook_dict)
    assert set(frame["pattern"]) == {f"blocks.{i}.attn.hook_pattern" for i in range(2)}
    assert ("position bias" in sites.describe()) is bias
    assert str(sites) == sites.describe()
    assert ("removed" in sites.describe()) is ("removed" in shields)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
def test_our_placements(placement: str, kv_heads: int, implementation: str) -> None:
    """Noise before the norm of a QKV-Norm model is removed by the norm, on sdpa as on eager."""
    model = ours(
        placement=placement, n_key_value_heads=kv_heads, attn_implementation=implementation
    )
    sites = hooks.attention_sites(model)
    for site in sites:
        assert site.tapped is (implementation == "sdpa")
        assert site.n_kv_heads == kv_heads
        wanted = "removed" if placement == "qkv" else "none"
        assert {site.q.shield, site.k.shield, site.v.shield} == {wanted}
        assert site.score_scale == pytest.approx([8**-0.5] * 4, rel=1e-3)
        assert site.scores_editable is (implementation == "eager")


@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
def test_noise_on_sdpa_is_the_noise_on_eager(placement: str) -> None:
    eager, sdpa = (ours(placement=placement, attn_implementation=a) for a in ("eager", "sdpa"))
    sdpa.load_state_dict(eager.state_dict())
    tokens = models.tokens(2, 12, vocab=23)
    noise = hooks.NormNoise(sigma=0.2, on="qkv", seed=1)
    outputs = []
    for model in (eager, sdpa):
        with noise.applied(model), torch.no_grad():
            outputs.append(model(tokens))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert (outputs[0] - eager(tokens)).abs().max() > 1e-2
    reports = [
        hooks.collapse_probe(m, tokens, sigmas=[0.1, 0.3], sparse=0.4) for m in (eager, sdpa)
    ]
    assert (reports[0].rows == reports[1].rows).all()
    assert reports[0].rows.sum() > 20
    for name in ("loose", "strict", "centred"):
        one, other = (getattr(report, name) for report in reports)
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no hook with scores"):
        hooks.NormNoise(sigma=0.1, on="k", rows="sparse").hooks(sdpa)


def test_sdpa_with_a_sliding_window() -> None:
    model = ours(placement="pre", window_size=3, attn_implementation="sdpa")
    assert all(site.tapped for site in hooks.attention_sites(model))


def test_norm_over_all_heads_is_mixed() -> None:
    """A norm over the whole projection leaks one head's noise into the others (OLMo 2 too)."""
    model = ours(placement="qkv", norm=NormSpec(over="projection"))
    for each in (model, model.to(torch.bfloat16)):
        assert {site.q.shield for site in hooks.attention_sites(each)} == {"mixed"}
    sites = hooks.attention_sites(builders.build("Olmo2ForCausalLM").model)
    assert {(s.q.shield, s.k.shield, s.v.shield) for s in sites} == {("mixed", "mixed", "none")}
    assert "leaks" in sites.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "shields"),
    [
        ("LlamaForCausalLM", ("none", "none", "none")),
        ("Qwen3ForCausalLM", ("removed", "removed", "none")),
        ("Gemma4ForCausalLM", ("removed", "removed", "removed")),
        ("DeepseekV3ForCausalLM", ("mixed", "mixed", "none")),
    ],
)
def test_shields_are_the_same_in_half_precision(
    name: str, shields: tuple[str, str, str], dtype: torch.dtype
) -> None:
    """Rounding moves lengths by percents there, the check's noise by half."""
    for site in hooks.attention_sites(builders.build(name, dtype=dtype).model):
        assert (site.q.shield, site.k.shield, site.v.shield) == shields


@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("name", ["OlmoForCausalLM", "Olmo2ForCausalLM"])
def test_a_model_that_needs_a_cache_in_half_precision_has_one(name: str, heads: str) -> None:
    """Its bridge multiplies two dtypes without; on transformers 5.24 with one, too."""
    model = builders.build(name, heads, dtype=torch.bfloat16).model
    ids = models.tokens(2, 13)
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        model(ids, use_cache=False)
    if RENAMED:
        with pytest.raises(hooks.UnsupportedModelError, match="a forward pass of the model"):
            hooks.attention_sites(model)
        return
    report = hooks.collapse_probe(model, ids, sparse=0.4, draws=0)
    exact = hooks.collapse_probe(builders.build(name, heads).model, ids, sparse=0.4, draws=0)
    assert report.rows.sum() > 100
    assert abs(report.rows.sum() - exact.rows.sum()) < 0.1 * exact.rows.sum()


def test_soft_cap_is_part_of_the_arithmetic() -> None:
    model = builders.build("Gemma2ForCausalLM", attn_logit_softcapping=2.0).model
    sites = hooks.attention_sites(model)
    assert {site.soft_cap for site in sites} == {2.0}
    scores = [site.scores for site in sites]
    _, cache = model.run_with_cache(models.tokens(2, 12), names_filter=scores)
    # The cap acts: scores come near it, and none beyond.
    shown = torch.cat([cache[name].flatten() for name in scores])
    largest = float(shown[shown > -1e4].abs().max())
    assert 1.5 < largest <= 2.0
    assert "soft cap" in sites.describe()


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"n_positions": 2}, r"a context of 2; numbers of heads \[2, 4\]"),
        # Three tokens would fit, but then nothing tells them from three heads.
        ({"n_positions": 3, "n_head": 3, "n_embd": 24}, r"a context of 3; .* \[2, 3\]"),
    ],
)
def test_a_context_too_short_to_check_in(options: dict[str, int], got: str) -> None:
    model = builders.build("GPT2LMHeadModel", **options).model
    wanted = rf"wanted room for 2 tokens or more, .* got {got}"
    with pytest.raises(hooks.UnsupportedModelError, match=wanted):
        hooks.attention_sites(model)


def test_a_layer_that_is_not_there() -> None:
    sites = hooks.attention_sites(models.tiny_gpt2())
    with pytest.raises(ValueError, match=r"wanted one of the attention layers \[0, 1\]; got 7"):
        sites.layer(7)
