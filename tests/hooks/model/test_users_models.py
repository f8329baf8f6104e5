"""Valid models and passes that a check on a few random tokens can't decide, or that hooks change.

The oracle for a pass with hooks is TransformerLens's own `run_with_hooks`, whose patterns are kept
by one more hook: nothing of `hooks` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

import hooks
from hooks import NormNoise, UnsupportedModelError, attention_sites, collapse_probe
from qkvnorm_lens import load_checkpoint
from qkvnorm_lens.text import sums
from tests.support.marks import slowly
from tests.support.models import (
    bridge,
    llama_like,
    tiny_gpt2,
    tiny_gpt2_config,
    tiny_hf,
    tiny_llama,
    tokens,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)

IDS = tokens(3, 16, seed=5)


def counted(model: Any, ids: Tensor, mine: list[Any], sparse: float = 0.5) -> list[int]:
    """Sparse rows of each layer in the user's own pass."""
    kept: dict[str, Tensor] = {}

    def keep(pattern: Tensor, hook: Any) -> None:
        kept[hook.name] = pattern.double()

    names = [n for n in model.hook_dict if n.endswith("attn.hook_pattern")]
    with torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=[*mine, *((n, keep) for n in names)])
    out = []
    for name in sorted(kept):
        top = kept[name].max(-1).values
        alone = ((top[..., None] - kept[name]) < 1e-5).sum(-1) == 1  # ties have no arg max
        out.append(int(((top >= sparse) & alone & ((kept[name] > 0).sum(-1) > 1)).sum()))
    return out


def rows(model: Any, ids: Any = IDS, **options: Any) -> list[int]:
    report = collapse_probe(model, ids, sparse=0.5, draws=0, sigmas=[0.1], **options)
    return [int(n) for n in report.rows.sum((1, 2, 3))]


# -- short contexts -----------------------------------------------------------------------------


def toy(n_ctx: int, n_head: int) -> Any:
    """As models of modular addition are: a context of three tokens."""
    config = GPT2Config(
        vocab_size=114, n_positions=n_ctx, n_embd=32, n_layer=2, n_head=n_head,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return bridge(GPT2LMHeadModel, config)


@pytest.mark.parametrize(("n_ctx", "n_head"), [(3, 4), (2, 4), (4, 4), (4, 8), (5, 1), (3, 2)])
def test_a_context_of_a_few_tokens_is_measured(n_ctx: int, n_head: int) -> None:
    model = toy(n_ctx, n_head)
    ids = tokens(40, n_ctx, seed=1, vocab=114)
    expected = counted(model, ids, [])
    assert min(expected) > 3
    assert rows(model, ids) == expected
    report = hooks.sweep(model, ids, sigmas=[0.1], replicates=1)
    assert report.targets.sum() == 40 * (n_ctx - 1)
    assert hooks.interference(model, ids, sparse=0.5, draws=1).rows.sum() == sum(expected)


# -- half precision -----------------------------------------------------------------------------


FEW = 12  # tokens whose queries and keys are short


def orthogonal(dtype: torch.dtype) -> Any:
    """All but a few tokens have long queries and keys that are orthogonal but for a little.

    Each product is then small against the lengths by which bfloat16 rounds it: on random tokens
    noise shows nothing that rounding could not.
    """
    config = tiny_gpt2_config(n_layers=1)
    hf = tiny_hf(GPT2LMHeadModel, config)
    with torch.no_grad():
        hf.transformer.wte.weight[FEW:, 0] += 100
        hf.transformer.wte.weight[:FEW, 1] += 100
        qkv = hf.transformer.h[0].attn.c_attn.weight
        qkv[1] = 0
        for head in range(4):
            qkv[0, 8 * head] += 3
            qkv[0, 32 + 8 * head + 1] += 3
    return build_bridge_from_module(
        hf.to(dtype), "GPT2LMHeadModel", hf_config=config, device="cpu", dtype=dtype
    )


def test_the_callers_prompts_decide_where_random_tokens_do_not() -> None:
    model, ids = orthogonal(torch.bfloat16), IDS % FEW
    with pytest.raises(UnsupportedModelError, match="not verifiable"):
        attention_sites(model)
    with pytest.raises(UnsupportedModelError, match="not verifiable"):
        collapse_probe(model, IDS % 50 + FEW, draws=0)
    options: dict[str, Any] = {"draws": 0, "sparse": 0.5, "sigmas": [0.1, 0.3]}
    report = collapse_probe(model, ids, **options)
    assert [int(n) for n in report.rows.sum((1, 2, 3))] == counted(model, ids, [])
    whole = collapse_probe(orthogonal(torch.float32), ids, **options)
    assert report.n_sparse == whole.n_sparse >= 10
    for mine, other in zip(report.loose, whole.loose, strict=True):
        assert mine.sum() == pytest.approx(other.sum(), rel=0.05)
        assert other.sum() > 1


@pytest.mark.parametrize(
    "measure",
    [
        lambda m, ids: hooks.sweep(m, ids, sigmas=[0.3], replicates=1),
        lambda m, ids: hooks.interference(m, ids, draws=1),
        hooks.spread,
        hooks.spectral_gap,
        attention_sites,
    ],
    ids=["sweep", "interference", "spread", "spectrum", "attention_sites"],
)
def test_whatever_reads_the_callers_prompts_is_decided_by_them(measure: Any) -> None:
    measure(orthogonal(torch.bfloat16), IDS % FEW)


def test_a_trained_model_in_half_precision() -> None:
    model = load_checkpoint("addition-qkv").to(torch.bfloat16)
    ids = sums("small-train", 16, seed=0).ids
    report = collapse_probe(model, ids, draws=0, sparse=0.5)
    whole = collapse_probe(load_checkpoint("addition-qkv"), ids, draws=0, sparse=0.5)
    assert report.n_sparse == pytest.approx(whole.n_sparse, rel=0.1)


@pytest.mark.parametrize("name", ["addition-none", "addition-pre", "addition-qkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_check_that_passed_has_an_error_beyond_its_tolerance(
    name: str, dtype: torch.dtype
) -> None:
    ids = sums("small-train", 4, seed=0).ids
    check = attention_sites(load_checkpoint(name).to(dtype), ids).check
    assert len(check) >= 16
    assert (check["error"] <= check["tolerance"]).all()


def test_a_window_of_nothing_is_refused_by_name() -> None:
    """Rows that see no key: Hugging Face averages over all of them, later ones too."""
    config = MistralConfig(**llama_like({}), sliding_window=0)
    hf = tiny_hf(MistralForCausalLM, config)
    model = build_bridge_from_module(hf, "MistralForCausalLM", hf_config=config, device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"layer 0: .*: wanted .*; got"):
        collapse_probe(model, IDS, draws=0)


def test_dtypes_that_do_not_meet_are_refused_by_name() -> None:
    model = tiny_llama()
    model.original_model.model.layers[1].mlp.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="a forward pass of the model"):
        collapse_probe(model, IDS, draws=0)


# -- hooks of the user's --------------------------------------------------------------------------


def _from_cache(model: Any, name: str) -> Callable[[Tensor, Any], Tensor]:
    """Vectors of other prompts, as path patching puts them in."""
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        model.run_with_hooks(
            IDS.flip(0), fwd_hooks=[(name, lambda x, hook: kept.update(x=x.clone()))]
        )
    return lambda x, hook: kept["x"]


def _zero(model: Any, name: str) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, hook: x * 0


def _mean(model: Any, name: str) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, hook: x.mean((0, 1), keepdim=True).expand_as(x)


def _one_head(model: Any, name: str) -> Callable[[Tensor, Any], Tensor]:
    def ablate(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        out[:, :, 1] = 0
        return out

    return ablate


HOOKS = {"from a cache": _from_cache, "zero": _zero, "mean": _mean, "one head": _one_head}


@pytest.mark.parametrize("where", ["q", "k", "v", "z"])
@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("build", [*slowly(tiny_gpt2), tiny_llama])
def test_hooks_that_patch_and_ablate_are_measured(
    build: Callable[[], Any], name: str, where: str
) -> None:
    model = build()
    point = f"blocks.0.attn.hook_{where}"
    mine = [(point, HOOKS[name](model, point))]
    expected = counted(model, IDS, mine)
    with model.hooks(fwd_hooks=mine):
        report = collapse_probe(model, IDS, sparse=0.5, draws=0, sigmas=[0.1], batch_size=3)
        assert any(words.startswith("with hooks on") for words in report.model["given"])
    assert [int(n) for n in report.rows.sum((1, 2, 3))] == expected
    assert not [p for p in model.hook_dict.values() if p.fwd_hooks]


LONG = tokens(2, 40, seed=6)


def biased_from(n_least: int) -> Callable[[Tensor, Any], Tensor]:
    """A bias of the scores on long prompts: noise does not scale it."""
    bias = 10 * torch.randn(40, 40, generator=torch.Generator().manual_seed(3))

    def add(scores: Tensor, hook: Any) -> Tensor:
        n = scores.shape[-1]
        return scores if n < n_least else scores + bias[:n, :n]

    return add


def one_hot_from(n_least: int) -> Callable[[Tensor, Any], Tensor]:
    """Attention to the first token: no softmax of the scores."""

    def replaced(pattern: Tensor, hook: Any) -> Tensor:
        if pattern.shape[-1] < n_least:
            return pattern
        return torch.zeros_like(pattern).index_fill(-1, torch.tensor([0]), 1.0)

    return replaced


@pytest.mark.parametrize(
    ("where", "hook", "named"),
    [
        ("attn_scores", biased_from(20), "a bias of the scores"),
        ("pattern", one_hot_from(20), "pattern = softmax"),
    ],
)
def test_hooks_at_the_scores_that_act_on_long_prompts_alone_are_found(
    where: str, hook: Callable[[Tensor, Any], Tensor], named: str
) -> None:
    model, point = tiny_llama(), f"blocks.0.attn.hook_{where}"
    with model.hooks(fwd_hooks=[(point, hook)]):
        short = collapse_probe(model, LONG[:, :15], draws=0)
        assert any(words.startswith("with hooks on") for words in short.model["given"])
        with pytest.raises(UnsupportedModelError, match=rf"{named}.*hooks of yours are on {point}"):
            collapse_probe(model, LONG, draws=0)
    collapse_probe(model, LONG, draws=0)


def test_a_bias_of_the_scores_by_a_hook_is_no_part_of_what_noise_scales() -> None:
    """At every length: the exact rate is the one that passes under noise have."""
    model, draws = tiny_llama(), 60
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_scores", biased_from(0))]):
        settings: dict[str, Any] = {"layers": [0], "sigmas": [0.4], "sparse": 0.9}
        exact = collapse_probe(model, LONG, draws=0, **settings)
        sampled = collapse_probe(model, LONG, method="sample", draws=draws, **settings)
    wanted, got = exact.loose.sum(), sampled.loose.sum()
    assert wanted > 2
    assert got == pytest.approx(wanted, rel=0.1)


def test_a_model_compiled_in_place_is_measured_without_it() -> None:
    model, plain = tiny_gpt2(), tiny_gpt2()
    model.compile(backend="eager")
    model.original_model.compile(backend="eager")
    calls = model._compiled_call_impl, model.original_model._compiled_call_impl
    assert rows(model) == rows(plain)
    report = collapse_probe(model, IDS, draws=0)
    assert any("without torch.compile" in words for words in report.model["given"])
    assert (model._compiled_call_impl, model.original_model._compiled_call_impl) == calls


def test_noise_beside_hooks_that_ablate() -> None:
    """Noise on k where z is ablated: what a hand-written hook gives."""
    model = tiny_gpt2()
    mine = [("blocks.0.attn.hook_z", _zero(model, ""))]
    noise = NormNoise(sigma=0.3, on="k")
    with model.hooks(fwd_hooks=mine), torch.no_grad():
        plain = model(IDS)
        with noise.applied(model):
            noisy = model(IDS)
    by_hand = []
    for layer in range(2):
        factor = noise.factors(layer=layer, role="k", n_heads=4, prompts=range(3), n_pos=16)
        by_hand.append((f"blocks.{layer}.attn.hook_k", lambda x, hook, f=factor: x * f[..., None]))
    with torch.no_grad():
        expected = model.run_with_hooks(IDS, fwd_hooks=[*mine, *by_hand])
    torch.testing.assert_close(noisy, expected)
    assert float((noisy - plain).abs().max()) > 1e-3


def test_a_hook_that_takes_another_shape_is_named() -> None:
    model = tiny_gpt2()
    point = "blocks.0.attn.hook_q"
    with (
        model.hooks(fwd_hooks=[(point, _from_cache(model, point))]),
        pytest.raises(
            ValueError, match=r"hooks: wanted hooks that take .*; got .* blocks\.0\.attn"
        ),
    ):
        collapse_probe(model, tokens(2, 11), draws=0)


def test_a_pass_that_draws_is_said_to_be_one_among_many() -> None:
    model = tiny_gpt2()

    def jitter(x: Tensor, hook: Any) -> Tensor:
        return x + 0.01 * torch.randn_like(x)

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", jitter)]):
        report = collapse_probe(model, IDS, draws=0)
    assert any("make two passes of one prompt differ" in words for words in report.model["given"])
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 2)]):
        report = collapse_probe(model, IDS, draws=0)
    assert not any("differ" in words for words in report.model["given"])


def test_hooks_are_back_after_a_check_without_them() -> None:
    model = tiny_gpt2()
    point = "blocks.0.attn.hook_pattern"
    with model.hooks(fwd_hooks=[(point, lambda p, hook: p * 0)]):
        before = {k: dict(p._forward_hooks) for k, p in model.hook_dict.items()}
        with pytest.raises(UnsupportedModelError, match=r"hooks of yours are on blocks\.0"):
            attention_sites(model)
        assert {k: dict(p._forward_hooks) for k, p in model.hook_dict.items()} == before
