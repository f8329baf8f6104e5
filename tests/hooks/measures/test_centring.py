"""hooks.CentredAttention, and `centred=True` of our models: A - U in place of A."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import hooks
from hooks import CentredAttention, UnsupportedModelError
from hooks.measures.symmetry.centring import visible_mean
from qkvnorm_lens.models.attention import visible_mean as ours_visible_mean
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import builders, models
from tests.support.watching import Found, shape_checks_off, tiny_gemma2, tiny_opt, watch

ids = models.tokens(3, 17)
SIZES = {"d_model": 16, "d_head": 8, "n_heads": 4, "n_layers": 2, "n_ctx": 32, "d_vocab": 97}


def ours(placement: str = "pre", **options: Any) -> QKVNormTransformer:
    cfg = QKVNormConfig(placement=placement, d_mlp=20, seed=3, **{**SIZES, **options})
    model = QKVNormTransformer(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def twin(plain: QKVNormTransformer, **changes: Any) -> QKVNormTransformer:
    """The same weights under a configuration that differs in these fields."""
    other = QKVNormTransformer(QKVNormConfig.from_json({**plain.cfg.to_json(), **changes})).eval()
    other = other.to(next(plain.parameters()).dtype)
    other.load_state_dict(plain.state_dict())
    return other


KINDS: dict[str, Any] = {
    **models.TINY,
    "gemma2": tiny_gemma2,
    "ours": lambda: to_bridge(ours()),
    "ours, no mask": lambda: to_bridge(ours(attention_dir="bidirectional")),
    "ours, window": lambda: to_bridge(ours(window_size=5, n_key_value_heads=2)),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return models.tiny_gpt2()


def logits(model: Any, tokens: Tensor = ids, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens, **options)
    return out


# -- the hooks equal the configuration -------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "no mask": {"attention_dir": "bidirectional"},
    "window": {"window_size": 5},
    "grouped": {"n_key_value_heads": 2},
    "one key/value head": {"n_key_value_heads": 1, "positional_embedding_type": "rotary"},
    "no skip": {"skip": "none"},
    "biases": {"attn_bias": True},
}


@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
@pytest.mark.parametrize("name", OPTIONS)
def test_hooks_on_our_models_are_the_configuration(name: str, placement: str) -> None:
    plain = ours(placement, **OPTIONS[name]).double()
    wanted = logits(twin(plain, centred=True))
    bridge = to_bridge(plain)
    fix = CentredAttention()
    with fix.applied(bridge), torch.no_grad():
        got = bridge(ids)
    by_list = bridge.run_with_hooks(ids, fwd_hooks=fix.hooks(bridge))
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(by_list, got)
    assert (got - logits(bridge)).abs().max() > 1e-2


def test_fused_attention_says_the_same() -> None:
    plain = ours().double()
    wanted = logits(twin(plain, centred=True))
    fused = twin(plain, centred=True, attn_implementation="sdpa")
    torch.testing.assert_close(logits(fused), wanted, atol=1e-9, rtol=1e-9)
    bridge = to_bridge(twin(plain, attn_implementation="sdpa"))
    assert [s.tapped for s in hooks.attention_sites(bridge)] == [True] * 2
    with CentredAttention().applied(bridge), torch.no_grad():
        torch.testing.assert_close(bridge(ids), wanted, atol=1e-9, rtol=1e-9)
    with pytest.raises(UnsupportedModelError, match=r"use CentredAttention.applied"):
        CentredAttention().hooks(bridge)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_visible_key(side: str, implementation: str) -> None:
    model = twin(ours(), centred=True, attn_implementation=implementation)
    at = slice(4, 21) if side == "left" else slice(0, 17)
    padded, mask = torch.zeros(3, 21, dtype=torch.long), torch.zeros(3, 21, dtype=torch.long)
    padded[:, at], mask[:, at] = ids, 1
    got = logits(model, padded, attention_mask=mask)[:, at]
    torch.testing.assert_close(got, logits(model), atol=1e-5, rtol=1e-5)


def test_a_cache_gives_the_centred_models_logits() -> None:
    """The mean runs over the cached keys too."""
    plain = twin(ours(), centred=True)
    whole = logits(plain)
    with torch.no_grad():
        first = plain(ids[:, :11], use_cache=True)
        rest = plain(ids[:, 11:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest, whole[:, 11:], atol=1e-5, rtol=1e-5)


# -- independent references in float64 -------------------------------------------------------


def centred_hf(hf: Any, layer: int) -> tuple[Tensor, Tensor]:
    """What a layer's attention writes, with A and with A - U, from Hugging Face's own pattern."""
    seen: dict[str, Tensor] = {}
    attn = hf.transformer.h[layer].attn if hasattr(hf, "transformer") else None
    block = attn if attn is not None else hf.model.layers[layer].self_attn

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]
        seen["out"] = output[0]

    handle = block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        pattern = hf(ids, output_attentions=True).attentions[layer]
        if attn is not None:  # a Conv1D holds W transposed, q, k and v side by side
            v = (seen["x"] @ attn.c_attn.weight + attn.c_attn.bias).split(32, -1)[2]
            weight, bias = attn.c_proj.weight, attn.c_proj.bias
        else:
            v = seen["x"] @ block.v_proj.weight.T
            weight, bias = block.o_proj.weight.T, torch.zeros(32).double()
        heads = v.unflatten(-1, (-1, 8))
        heads = heads.repeat_interleave(4 // heads.shape[2], 2)
        n = ids.shape[1]
        uniform = torch.tensor([[1 / (i + 1) if j <= i else 0.0 for j in range(n)]
                                for i in range(n)]).double()  # fmt: skip
        z = ((pattern - uniform) @ heads.transpose(1, 2)).transpose(1, 2)
    handle.remove()
    return seen["out"], z.flatten(2) @ weight + bias


@pytest.mark.parametrize(
    ("build", "cls", "config"),
    [
        (models.tiny_gpt2, GPT2LMHeadModel, models.tiny_gpt2_config),
        (models.tiny_llama, LlamaForCausalLM, models.tiny_llama_config),
    ],
    ids=["gpt2", "llama"],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_equals_a_reference_in_float64(build: Any, cls: Any, config: Any, layer: int) -> None:
    plain, wanted = centred_hf(models.tiny_hf(cls, config()).double(), layer)
    bridge = build().double()
    name = f"blocks.{layer}.attn.hook_out"
    torch.testing.assert_close(watch(bridge, ids, [name])[name], plain, atol=1e-9, rtol=1e-9)
    fix = CentredAttention(layers=(layer,)).hooks(bridge)
    got = watch(bridge, ids, [name], fix)[name]
    # Llama's softmax is taken in float32.
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert (got - plain).abs().max() > 0.1


# -- laws ----------------------------------------------------------------------------------------


def z_and_v(model: Any, layer: int, *, fixed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, v of every query head, pattern, and visible keys of a layer."""
    sites = hooks.attention_sites(model).layer(layer)
    assert sites.z is not None
    names = [sites.z.hook, sites.v.dot.hook, sites.pattern, sites.scores]
    fwd_hooks = CentredAttention(layers=(layer,)).hooks(model) if fixed else []
    seen = watch(model, ids, names, fwd_hooks)
    v = sites.v.dot.by_position(seen[names[1]])[:, :, list(sites.kv_head_of)]
    return sites.z.by_position(seen[names[0]]), v, seen[names[2]], seen[names[3]] > -3e4


def test_z_is_a_minus_u_times_v(model: Any) -> None:
    for layer in range(2):
        z, v, pattern, mask = z_and_v(model, layer, fixed=True)
        uniform = mask / mask.sum(-1, keepdim=True)
        wanted = torch.einsum("bhqk,bkhd->bqhd", pattern - uniform, v)
        torch.testing.assert_close(z, wanted, atol=2e-5, rtol=1e-4)


def test_without_a_mask_it_is_centring_the_values_over_all_tokens() -> None:
    """(A - (1/T) 1 1^T) v = A (v - mean of v), as every row of A sums to one."""
    bridge = to_bridge(ours(attention_dir="bidirectional", n_key_value_heads=2))

    def centre(v: Tensor, hook: Any) -> Tensor:
        return v - v.mean(1, keepdim=True)

    entries = [(hooks.attention_sites(bridge).layer(i).v.dot.hook, centre) for i in range(2)]
    with torch.no_grad():
        by_values = bridge.run_with_hooks(ids, fwd_hooks=entries)
        with CentredAttention().applied(bridge):
            fixed = bridge(ids)
    torch.testing.assert_close(fixed, by_values, atol=1e-5, rtol=1e-5)
    masked = to_bridge(ours(n_key_value_heads=2))
    with torch.no_grad():
        by_values = masked.run_with_hooks(ids, fwd_hooks=entries)
        with CentredAttention().applied(masked):
            fixed = masked(ids)
    assert (fixed - by_values).abs().max() > 1e-2  # no one centring serves all rows


def test_bert_sees_all_tokens_and_has_its_values_centred() -> None:
    """Somebody else's model without a mask; a norm follows its W_O."""
    bert = builders.build("BertForMaskedLM").model
    layers = list(hooks.attention_sites(bert))

    def centre(v: Tensor, hook: Any) -> Tensor:
        return v - v.mean(1, keepdim=True)

    with torch.no_grad():
        by_values = bert.run_with_hooks(ids, fwd_hooks=[(s.v.dot.hook, centre) for s in layers])
        with CentredAttention().applied(bert):
            fixed = bert(ids)
        clean = bert(ids)
    assert {s.v.dot.head_axis for s in layers} == {2}
    torch.testing.assert_close(fixed, by_values, atol=1e-4, rtol=1e-4)
    assert (fixed - clean).abs().max() > 0.01


def test_values_that_all_tokens_share_give_nothing(model: Any) -> None:
    """A 1 = U 1 = 1."""

    def share(v: Tensor, hook: Any) -> Tensor:
        return v[:, :1].expand_as(v).clone()

    sites = hooks.attention_sites(model).layer(0)
    assert sites.z is not None
    fix = CentredAttention(layers=(0,)).hooks(model)
    entries = [(sites.v.dot.hook, share), *fix]
    assert watch(model, ids, [sites.z.hook], entries)[sites.z.hook].abs().max() < 1e-5


def test_a_row_that_sees_one_key_gives_nothing(model: Any) -> None:
    z, _, _, mask = z_and_v(model, 0, fixed=True)
    alone = (mask.sum(-1) == 1).all(1)  # [batch, query]
    assert alone.any() or mask.all()
    assert (z[alone].abs() < 1e-5).all()


def test_the_pattern_stays_what_it_was(model: Any) -> None:
    _, _, pattern, _ = z_and_v(model, 0, fixed=True)
    assert torch.equal(pattern, z_and_v(model, 0, fixed=False)[2])


def test_other_layers_are_left_alone(gpt2: Any) -> None:
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_out"]
    both, first, second = (
        watch(gpt2, ids, names, CentredAttention(layers=layers).hooks(gpt2))
        for layers in (None, (0,), (1,))
    )
    clean = watch(gpt2, ids, ["blocks.0.attn.hook_z"])["blocks.0.attn.hook_z"]
    assert torch.equal(both["blocks.0.attn.hook_z"], first["blocks.0.attn.hook_z"])
    assert torch.equal(second["blocks.0.attn.hook_z"], clean)
    assert not torch.allclose(both["logits"], first["logits"])


def test_it_leaves_the_spectrum_that_the_report_says() -> None:
    """z = (A - U) v: with unit vectors as values its matrix is A - U itself."""
    n = 8
    bridge = to_bridge(ours(d_head=n))

    def units(v: Tensor, hook: Any) -> Tensor:
        return torch.eye(n)[None, :, None].expand_as(v).clone()

    report = hooks.spectral_gap(bridge, ids[:, :n], k=n, layers=[0], progress=False)
    sites = hooks.attention_sites(bridge).layer(0)
    assert sites.z is not None
    fix = CentredAttention(layers=(0,)).hooks(bridge)
    z = watch(bridge, ids[:, :n], [sites.z.hook], [(sites.v.dot.hook, units), *fix])[sites.z.hook]
    values = np.linalg.svd(z.transpose(1, 2).double().numpy(), compute_uv=False)
    np.testing.assert_allclose(values, report.left[0], atol=1e-5)


def test_means_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool()[None, None]
    assert visible_mean(values, mask).flatten().tolist() == [1, 3, 4, 0]
    ours_mean = ours_visible_mean(values.transpose(1, 2), mask)
    assert ours_mean.flatten().tolist() == [1, 3, 4, 0]
    assert ours_visible_mean(values.transpose(1, 2), None).flatten().tolist() == [1, 1.5, 3]


# -- the model is left, and what is refused -------------------------------------------------------


def test_the_model_is_left_as_it_was_found() -> None:
    bridge = models.tiny_llama()
    bridge(ids)
    bridge.train()
    with shape_checks_off():
        before = Found(bridge)
        CentredAttention().hooks(bridge)
        with CentredAttention().applied(bridge):
            bridge(ids)
        with pytest.raises(KeyError), CentredAttention().applied(bridge):
            raise KeyError
        before.assert_same(Found(bridge))


@pytest.mark.parametrize("layers", [[], [0, 0], 1, ["0"], [True]])
def test_wrong_layers_are_refused(layers: Any) -> None:
    with shape_checks_off(), pytest.raises(ValueError, match="layers: wanted one or more indices"):
        CentredAttention(layers=layers)


def test_an_unknown_layer_is_refused(gpt2: Any) -> None:
    with pytest.raises(ValueError, match="layers: wanted one of the attention layers"):
        CentredAttention(layers=(5,)).hooks(gpt2)


def test_a_centred_model_is_not_centred_again() -> None:
    bridge = to_bridge(ours(centred=True))
    with pytest.raises(UnsupportedModelError, match="centred already"):
        CentredAttention().hooks(bridge)


def two_contexts(bridge: Any) -> None:
    with CentredAttention().applied(bridge):
        bridge(ids)


def hooks_of_a_second(bridge: Any) -> None:
    CentredAttention(layers=(1,)).hooks(bridge)


@pytest.mark.parametrize("second", [two_contexts, hooks_of_a_second])
@pytest.mark.parametrize(  # hooks() is refused on sdpa
    ("way", "implementation"), [("applied", "eager"), ("applied", "sdpa"), ("hooks", "eager")]
)
def test_a_second_one_on_a_layer_is_refused(way: str, second: Any, implementation: str) -> None:
    """Two would give A - 2U."""
    bridge = to_bridge(ours(attn_implementation=implementation))
    bridge(ids)
    fix = CentredAttention()
    first = fix.applied(bridge) if way == "applied" else bridge.hooks(fwd_hooks=fix.hooks(bridge))
    with shape_checks_off():
        before = Found(bridge)
        with first, torch.no_grad():
            once = bridge(ids)
            with pytest.raises(UnsupportedModelError, match=r"CentredAttention.*A - 2U"):
                second(bridge)
            torch.testing.assert_close(bridge(ids), once)  # the first one stays
        before.assert_same(Found(bridge))
    two_contexts(bridge)


def test_hooks_made_before_both_were_active_are_refused_in_the_pass(gpt2: Any) -> None:
    one, other = (CentredAttention(layers=(1,)).hooks(gpt2) for _ in range(2))
    clean = logits(gpt2)
    with shape_checks_off():
        before = Found(gpt2)
        with pytest.raises(UnsupportedModelError, match=r"layer 1: CentredAttention.*A - 2U"):
            gpt2.run_with_hooks(ids, fwd_hooks=[*one, *other])
        with (
            CentredAttention().applied(gpt2),
            pytest.raises(UnsupportedModelError, match="A - 2U"),
        ):
            gpt2.run_with_hooks(ids, fwd_hooks=one)
        before.assert_same(Found(gpt2))
    assert torch.equal(logits(gpt2), clean)


def test_each_layer_may_have_its_own(gpt2: Any) -> None:
    with CentredAttention().applied(gpt2), torch.no_grad():
        wanted = gpt2(ids)
    with (
        CentredAttention(layers=(0,)).applied(gpt2),
        CentredAttention(layers=(1,)).applied(gpt2),
        torch.no_grad(),
    ):
        torch.testing.assert_close(gpt2(ids), wanted)


@pytest.mark.parametrize("value", [1, 0, "no", None])
def test_a_configuration_takes_a_boolean(value: Any) -> None:
    with shape_checks_off(), pytest.raises(TypeError, match="centred: wanted True or False; got"):
        ours(centred=value)


def test_an_attention_without_hooked_scores_wants_the_context() -> None:
    opt = tiny_opt()
    with pytest.raises(UnsupportedModelError, match=r"use CentredAttention.applied"):
        CentredAttention().hooks(opt)
    sites = hooks.attention_sites(opt).layer(0)
    assert sites.z is not None
    before = watch(opt, ids, [sites.z.hook, sites.v.dot.hook])
    with CentredAttention(layers=(0,)).applied(opt):
        after = watch(opt, ids, [sites.z.hook])
    v = sites.v.dot.by_position(before[sites.v.dot.hook])
    mean = v.cumsum(1) / torch.arange(1, 18)[:, None, None]
    wanted = sites.z.by_position(before[sites.z.hook]) - mean
    got = sites.z.by_position(after[sites.z.hook])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_cross_attention_is_refused() -> None:
    t5 = builders.build("T5ForConditionalGeneration").model
    with pytest.raises(UnsupportedModelError, match="wanted self-attention; got cross-attention"):
        CentredAttention().hooks(t5)


def test_a_cached_step_is_refused(gpt2: Any) -> None:
    with CentredAttention().applied(gpt2), torch.no_grad():
        cache = gpt2.original_model(ids[:, :9], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="on a cached step: wanted a pass without a cache"):
            gpt2.original_model(ids[:, 9:10], past_key_values=cache)


def test_an_edit_that_does_not_land_is_refused(gpt2: Any) -> None:
    """A hook of the user's that undoes whatever an edit of z had changed."""
    lands = CentredAttention(layers=(0,))
    lands.hooks(gpt2)

    def undo(tensor: Tensor, hook: Any) -> Tensor:
        return tensor[:1].expand_as(tensor).clone()

    with (
        gpt2.hooks(fwd_hooks=[("blocks.0.attn.o.hook_out", undo)]),
        pytest.raises(UnsupportedModelError, match="an edit of z in what the attention writes"),
    ):
        lands.hooks(gpt2)
