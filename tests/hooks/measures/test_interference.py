"""Interference without injected noise: against hand-made norms, and models built to show it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, Olmo2Config, Olmo2ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hooks import InterferenceReport, UnsupportedModelError, attention_sites, interference
from hooks.measures.interference.count import shuffles
from hooks.model.inputs import short_input
from hooks.noise.laws import LAWS
from hooks.sites.norm import inner_norms
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import NormSpec, QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import models
from tests.support.watching import (
    Found,
    attn,
    shape_checks_off,
    tiny_gemma2,
    tiny_opt,
    watch,
)

ids = models.tokens(batch=4, pos=24)


def long_and_short(model: Any) -> Any:
    """The same model (a bridge, or Hugging Face's own) with embeddings of unlike lengths."""
    table = getattr(model, "original_model", model).get_input_embeddings().weight
    size = torch.randn(len(table), generator=torch.Generator().manual_seed(3)).mul(0.7).exp()
    with torch.no_grad():
        table.mul_(size[:, None].to(table))
    return model


def of_kind(build: Any) -> Any:
    return lambda: long_and_short(build())


KINDS = {name: of_kind(build) for name, build in models.TINY.items()}
KINDS["gemma2"] = of_kind(lambda: tiny_gemma2(qk_scale=2.0))  # few scores at the cap
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    with shape_checks_off():
        yield


def measure(model: Any, tokens: Any = ids, **options: Any) -> InterferenceReport:
    return interference(model, tokens, progress=False, **options)


# -- a head built so that one can name the rows -------------------------------------------------

C, A, B = 1, 2, 3  # filler; what the head looks for; more of it, in a token that is long


def built(**options: Any) -> Any:
    """One Pre-Norm head whose score is 50 u_t / s_t, where u is a token's second component.

        C: u = 0.1, s = 1/2 sqrt(1 + 0.01)          A: u = 3, s = 1/2 sqrt(1 + 9)
        B: u = 4, s = 1/2 sqrt(1 + 16 + 64)

    A has the largest u / s of the three, B the largest u. The first component is 1 in all of them,
    the query reads it, with its own norm taken back by the gain's place: queries differ by s_q.
    """
    cfg = QKVNormConfig(
        placement="pre",
        d_model=4,
        d_head=4,
        n_heads=1,
        n_layers=1,
        n_ctx=16,
        d_vocab=5,
        attn_only=True,
        score_scale="none",
        positional_embedding_type="none",
        eps=1e-12,
        **options,
    )
    plain = QKVNormTransformer(cfg).eval()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "gain" not in name and "ln" not in name:
                p.zero_()
        table = [[1, 0, 0, 0], [1, 0.1, 0, 0], [1, 3, 0, 0], [1, 4, 8, 0], [1, 0.2, 0, 1]]
        plain.tok_embed.weight.copy_(torch.tensor(table))
        block = plain.layers[0].attn
        block.q.weight[0, 0] = 1.0
        block.k.weight[0, 1] = 50.0
        block.v.weight.copy_(torch.eye(4))
        block.o.weight.copy_(torch.eye(4))
        plain.head.weight.copy_(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    return to_bridge(plain)


@pytest.mark.parametrize(
    ("prompt", "rows", "moved", "to_first"),
    [
        ([C, A, C], (2, 0), (0, 0), (0, 0)),
        ([C, A, C, B], (3, 0), (1, 0), (0, 0)),  # the row of B itself sees B
        ([C, A, C, B, C], (4, 0), (2, 0), (0, 0)),
        ([A, C, B], (0, 2), (0, 1), (0, 0)),  # from a sink to content
        ([B, A, C], (2, 0), (2, 0), (2, 0)),  # from content to the first token
        ([C, B, C], (2, 0), (0, 0), (0, 0)),  # B alone has no rival
    ],
)
def test_the_rows_that_move_are_those_one_can_name(
    prompt: list[int], rows: Any, moved: Any, to_first: Any
) -> None:
    report = measure(built(), [prompt])
    assert tuple(report.rows[0, 0, 0]) == rows
    for on in range(2):
        assert tuple(report.loose[on, 0, 0, 0, 0]) == moved
        assert tuple(report.strict[on, 0, 0, 0, 0]) == moved  # 50 (4 - 3) between the first two
        assert tuple(report.to_first[on, 0, 0, 0, 0]) == to_first
    assert tuple(report.factored[0, 0, 0]) == moved


def test_scales_and_sparing_the_first_token() -> None:
    prompt = [B, A, C]
    s = np.array([math.sqrt(81 / 4), math.sqrt(10 / 4), math.sqrt(1.01 / 4)])
    report = measure(built(), [prompt], spare_first=True)
    assert report.constant[0, 0] == pytest.approx(np.median(s), rel=1e-6)
    spread = [x.std() / x.mean() for x in (s, s[1:])]
    np.testing.assert_allclose(report.scale_spread[0, 0], spread, rtol=1e-5)
    # B keeps its own length now, and loses to A as before.
    assert report.loose.sum() == 0
    assert report.rows.sum() == 2
    seen = [1.0, *(s[1:] / np.median(s))]
    squares = [(np.std(seen[: n + 1]) / np.mean(seen[: n + 1])) ** 2 for n in (1, 2)]
    assert report.sigma_squared.sum() == pytest.approx(sum(squares), rel=1e-5)


def test_what_independent_noise_would_do_agrees_with_drawing_it() -> None:
    prompt = [C, A, C, B, A]
    report = measure(built(), [prompt])
    values = {C: (0.1, 1.01), A: (3.0, 10.0), B: (4.0, 81.0)}
    u = np.array([values[t][0] for t in prompt])
    s = np.array([math.sqrt(values[t][1] / 4) for t in prompt])
    rng = torch.Generator().manual_seed(0)
    expected, variance, n = 0.0, 0.0, 200_000
    sparse = [1, 2, 3]  # row 4 sees A twice: a tie, and not sparse
    for q in sparse:
        seen = slice(0, q + 1)
        sigma = float(np.std(s[seen]) / np.mean(s[seen]))
        law = LAWS["uniform" if sigma < 1 / math.sqrt(3) else "lognormal"]
        drawn = law.factor(torch.rand(n, q + 1, generator=rng, dtype=torch.float64), sigma)
        clean = torch.tensor(u[seen] / s[seen])
        p = float(((drawn * clean).argmax(1) != int(clean.argmax())).double().mean())
        expected += p
        variance += p * (1 - p) / n
    assert report.rows.sum() == len(sparse)
    assert 0.2 < expected < 2.5
    assert abs(report.predicted.sum() - expected) < 5 * math.sqrt(variance) + 1e-6


# -- laws ---------------------------------------------------------------------------------------


def ours(**options: Any) -> Any:
    """A random Pre-Norm model of ours, its scores large enough for sparse rows."""
    cfg = QKVNormConfig(
        placement="pre",
        d_model=32,
        d_head=8,
        n_heads=4,
        n_layers=2,
        n_ctx=32,
        d_vocab=models.VOCAB,
        score_scale="none",
        **options,
    )
    plain = QKVNormTransformer(cfg).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(plain.named_parameters()):
            generator = torch.Generator().manual_seed(i)
            centre, size = (1.0, 0.3) if p.ndim == 1 and "bias" not in name else (0.0, 0.45)
            p.copy_(centre + size * torch.randn(p.shape, generator=generator))
    return to_bridge(plain)


UNBIASED = {
    "llama": KINDS["llama"],
    "ours": ours,
    "ours, one gain": lambda: ours(norm=NormSpec(over="input", gains="shared")),
    "ours, LayerNorm": lambda: ours(norm=NormSpec(kind="layer", over="input")),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_without_biases_neither_the_constant_nor_q_can_matter(name: str) -> None:
    report = measure(UNBIASED[name](), constants=FACTORS)
    assert report.loose[0, 0].sum() >= 10
    for on in range(2):
        for constant in range(len(FACTORS)):
            np.testing.assert_array_equal(report.loose[on, constant], report.loose[0, 0])
    np.testing.assert_array_equal(report.factored, report.loose[0, 0])
    # A smaller constant makes sharper rows: the strict counts do depend on it.
    strict = report.strict[0].sum((1, 2, 3, 4))
    assert strict[0] > strict[-1]


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_with_biases_the_constant_matters(name: str) -> None:
    model = KINDS[name]()
    with torch.no_grad():
        for block in model.blocks:
            block.ln1.original_component.bias.mul_(8)
    report = measure(model, constants=FACTORS, sparse=0.6)
    k, qk = report.loose.sum((2, 3, 4, 5)).tolist()
    assert max(qk) > min(qk)
    if name == "gpt2":
        # q . k0 is the same for all keys of a row, so that for k alone the constant is a scale.
        np.testing.assert_array_equal(report.loose[0], report.loose[0, :1].repeat(5, 0))
        assert min(k) >= 10
    else:  # ALiBi does not scale with the rest
        assert max(k) > min(k)
    # Factors on the finished keys are another intervention where the keys have a part of their own.
    assert (report.factored != report.loose[0, 2]).any()


def test_a_norm_behind_the_projection_takes_every_scale_away() -> None:
    report = measure(KINDS["qwen3"](), constants=FACTORS)
    assert report.rows.sum() >= 50
    assert report.scale_spread[..., 1].min() > 0.05
    assert report.loose.sum() == 0
    assert report.factored.sum() > 0  # ... which factors behind that norm would have moved


def test_equal_scales_move_nothing() -> None:
    model = ours(positional_embedding_type="none")
    with torch.no_grad():
        weight = model.original_model.tok_embed.weight
        weight.div_(weight.square().mean(-1, keepdim=True).sqrt())
    report = measure(model, layers=[0])
    assert report.rows.sum() >= 50
    for name in ("loose", "factored", "permuted"):
        assert getattr(report, name).sum() == 0, name
    assert report.predicted.sum() == pytest.approx(0, abs=1e-6)
    assert report.scale_spread.max() < 1e-4


# -- against forward passes made by hand ----------------------------------------------------------


def raw_norm(model: Any, layer: int) -> tuple[Tensor, Tensor, bool, float]:
    """Gain, bias, kind and eps of a norm, read from the module."""
    module = model.blocks[layer].ln1.original_component
    weight = module.weight.detach().double()
    if "Gemma" in type(module).__name__:
        weight = 1 + weight
    bias = getattr(module, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach().double()
    eps = next(getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n))
    return weight, bias, isinstance(module, torch.nn.LayerNorm), eps


def by_hand(
    model: Any, layer: int, constant: float, *, q_clean: bool, spare_first: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Clean and frozen scores and pattern of one layer, and the logits."""
    gain, bias, centred, eps = raw_norm(model, layer)
    q_hook = attention_sites(model).layer(layer).q.dot.hook
    names = [attn(layer, "attn_scores"), attn(layer, "pattern"), f"blocks.{layer}.ln1.hook_in"]
    clean = watch(model, ids, [*names, q_hook])
    x = clean[names[2]].double()
    x = x - x.mean(-1, keepdim=True) if centred else x
    s = (x.square().mean(-1) + eps).sqrt()
    c = constant * s.quantile(0.5, dim=1)[:, None].expand_as(s).clone()
    if spare_first:
        c[:, 0] = s[:, 0]
    y = (gain * x / c[..., None] + bias).float()
    edits: list[Any] = [(f"blocks.{layer}.ln1.hook_out", lambda tensor, hook: y)]
    if q_clean:
        edits.append((q_hook, lambda tensor, hook: clean[q_hook]))
    frozen = watch(model, ids, names[:2], edits)
    return clean, frozen


def counted(clean: Any, frozen: Any, layer: int, sparse: float = 0.95) -> dict[str, Any]:
    """Least and largest counts [head, prompt, kind]: rows within rounding count for the second."""
    names = attn(layer, "attn_scores"), attn(layer, "pattern")
    star = clean[names[0]].argmax(-1, keepdim=True)
    rows = (clean[names[1]].amax(-1) >= sparse) & ((clean[names[0]] > -1e30).sum(-1) > 1)
    w = frozen[names[0]].double()
    own = w.gather(-1, star).squeeze(-1)
    lead = w.scatter(-1, star, -math.inf).amax(-1) - own
    near = lead.abs() < 2e-5 * (1 + own.abs())
    top = frozen[names[1]].amax(-1)
    star = star.squeeze(-1)

    def kinds(x: Tensor) -> np.ndarray:
        both = torch.stack([(x & (star != 0)).sum(-1), (x & (star == 0)).sum(-1)], -1)
        return both.transpose(0, 1).numpy()

    surely, maybe = rows & (lead > 0) & ~near, rows & ((lead > 0) | near)
    return {
        "loose": (kinds(surely), kinds(maybe)),
        "strict": (kinds(surely & (top > sparse + 1e-4)), kinds(maybe & (top > sparse - 1e-4))),
    }


@pytest.mark.parametrize("on", ["k", "qk"])
@pytest.mark.parametrize("name", KINDS)
def test_counts_are_those_of_passes_with_a_norm_frozen_by_hand(name: str, on: str) -> None:
    model = KINDS[name]()
    report = measure(model, constants=[1.0, 2.0], on=[on], sparse=0.6)
    seen = doubtful = 0
    for layer in range(2):
        for j, constant in enumerate((1.0, 2.0)):
            passes = by_hand(model, layer, constant, q_clean=on == "k")
            for kind, (least, most) in counted(*passes, layer, 0.6).items():
                got = getattr(report, kind)[0, j, layer]
                assert (least <= got).all(), (layer, constant, kind)
                assert (got <= most).all(), (layer, constant, kind)
                seen, doubtful = seen + int(least.sum()), doubtful + int((most - least).sum())
    if name != "qwen3":  # there no score changes, so that none is far from where it was
        assert doubtful <= 2 + 0.05 * seen
        assert seen >= 10


def test_sparing_the_first_token_by_hand() -> None:
    model = KINDS["llama"]()
    report = measure(model, on="k", spare_first=True)
    least, most = counted(*by_hand(model, 1, 1.0, q_clean=True, spare_first=True), 1)["loose"]
    assert (least <= report.loose[0, 0, 1]).all()
    assert (report.loose[0, 0, 1] <= most).all()
    assert (report.loose != measure(model, on="k").loose).any()


def in_float64(kind: str, layer: int) -> tuple[Tensor, Tensor]:
    """Clean scores and those with k frozen, [batch, head, query, key], from the weights alone."""
    build = {
        "llama": (models.LlamaForCausalLM, models.tiny_llama_config()),
        "gpt2": (models.GPT2LMHeadModel, models.tiny_gpt2_config()),
    }[kind]
    hf = long_and_short(models.tiny_hf(*build)).double()
    with torch.no_grad():
        x = hf(ids, output_hidden_states=True).hidden_states[layer]
    batch, pos, d = x.shape
    if kind == "gpt2":
        block = hf.transformer.h[layer]
        norm, width, heads, kv = block.ln_1, 8, 4, 4
        x = x - x.mean(-1, keepdim=True)
        bias, eps = norm.bias, norm.eps
        projection = block.attn.c_attn
        w_q, w_k = (projection.weight[:, i * d : (i + 1) * d] for i in range(2))
        b_q, b_k = (projection.bias[i * d : (i + 1) * d] for i in range(2))
    else:
        block = hf.model.layers[layer]
        norm, width, heads, kv = block.input_layernorm, 8, 4, 2
        bias, eps = torch.zeros(d), norm.variance_epsilon
        w_q, w_k = block.self_attn.q_proj.weight.T, block.self_attn.k_proj.weight.T
        b_q, b_k = torch.zeros(w_q.shape[1]), torch.zeros(w_k.shape[1])
    s = (x.square().mean(-1) + eps).sqrt()
    c = s.quantile(0.5, dim=1)[:, None].expand_as(s)
    made = []
    with torch.no_grad():
        for scale in (s, c):
            y = norm.weight * x / scale[..., None] + bias
            q = (y @ w_q + b_q).view(batch, pos, heads, width).transpose(1, 2)
            k = (y @ w_k + b_k).view(batch, pos, kv, width).transpose(1, 2)
            if kind == "llama":
                cos, sin = hf.model.rotary_emb(x, torch.arange(pos)[None])
                q, k = apply_rotary_pos_emb(q, k, cos, sin)
            made.append((q, k.repeat_interleave(heads // kv, 1)))
    later = torch.ones(pos, pos, dtype=torch.bool).triu(1)
    clean, frozen = (
        (made[0][0] @ k.transpose(-1, -2) / math.sqrt(width)).masked_fill(later, -math.inf)
        for k in (made[0][1], made[1][1])
    )
    return clean, frozen


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_counts_are_those_of_the_weights_in_float64(kind: str) -> None:
    report = measure(KINDS[kind](), on="k")
    total = 0
    for layer in range(2):
        clean, frozen = in_float64(kind, layer)
        seen = {
            attn(layer, "attn_scores"): clean,
            attn(layer, "pattern"): clean.softmax(-1),
        }
        then = {
            attn(layer, "attn_scores"): frozen,
            attn(layer, "pattern"): frozen.softmax(-1),
        }
        for name, (least, most) in counted(seen, then, layer).items():
            got = getattr(report, name)[0, 0, layer]
            assert (least <= got).all(), (layer, name)
            assert (got <= most).all(), (layer, name)
            total += int(least.sum())
    assert total >= 10


def test_a_layer_read_at_its_softmax_counts_too() -> None:
    report = measure(tiny_opt())
    assert report.rows.sum() > 0
    assert (report.loose <= report.rows).all()


def test_shuffled_factors_by_hand() -> None:
    model = KINDS["llama"]()
    report = measure(model, draws=3, seed=5, first_prompt=7)
    _, _, _, eps = raw_norm(model, 1)
    names = [attn(1, "attn_scores"), attn(1, "pattern"), "blocks.1.ln1.hook_in"]
    clean = watch(model, ids, names)
    s = (clean[names[2]].double().square().mean(-1) + eps).sqrt()
    for draw in range(3):
        order = shuffles(5, 1, range(7, 11), torch.zeros(4, 24, dtype=torch.bool), draw)
        assert (order.sort(1).values == torch.arange(24)).all()
        scores = clean[names[0]].double()
        shuffled = torch.where(scores > -1e30, scores * s.gather(1, order)[:, None, None], scores)
        then = {names[0]: shuffled, names[1]: shuffled.softmax(-1)}
        least, most = counted(clean, then, 1)["loose"]
        assert (least <= report.permuted[draw, 1]).all()
        assert (report.permuted[draw, 1] <= most).all()
    assert (report.permuted[0] != report.permuted[1]).any()


def test_shares_of_the_variance_by_hand() -> None:
    model = KINDS["llama"]()
    report = measure(model)
    k_hook = attention_sites(model).layer(0).k.dot.hook
    names = [attn(0, "attn_scores"), attn(0, "pattern"), k_hook]
    seen = watch(model, ids, names)
    lengths = attention_sites(model).layer(0).k.dot.by_position(seen[k_hook]).double().norm(dim=-1)
    for head, prompt in ((0, 0), (3, 2)):
        scores = seen[names[0]][prompt, head].double()
        length = lengths[prompt, :, head // 2]
        sums = np.zeros((2, 3))
        for q in range(1, 24):
            for i, first in enumerate((0, 1)):
                s, size = scores[q, first : q + 1].numpy(), length[first : q + 1].numpy()
                if len(s) < 2:
                    continue
                along = s / size
                sums[i] += [s.var(), (size * along.mean()).var(), (size.mean() * along).var()]
        np.testing.assert_allclose(report.variance[0, head, prompt, 0], sums, rtol=1e-4)
    frame = report.to_frame("layer").iloc[0]
    total = report.variance[0].sum((0, 1))
    assert frame["length_share"] == pytest.approx(total[0, 0, 1] / total[0, 0, 0])
    assert frame["direction_share_rest"] == pytest.approx(total[0, 1, 2] / total[0, 1, 0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_output_by_hand(name: str) -> None:
    model = KINDS[name]()
    report = measure(model, output=True, on=["qk"])
    for layer in range(2):
        clean, frozen = by_hand(model, layer, 1.0, q_clean=False)
        p, q = (x["logits"].double().log_softmax(-1)[:, :-1] for x in (clean, frozen))
        kl = (p.exp() * (p - q)).sum(-1)
        np.testing.assert_allclose(report.kl[0, layer], kl.sum(1), rtol=1e-3)
        loss = [-x.gather(-1, ids[:, 1:, None]).sum((1, 2)) for x in (p, q)]
        np.testing.assert_allclose(report.clean_loss, loss[0], rtol=1e-4)
        np.testing.assert_allclose(report.loss[0, layer], loss[1], rtol=1e-4)
        agree = (p.argmax(-1) == q.argmax(-1)).sum(1)
        np.testing.assert_array_equal(report.agree[0, layer], agree)
        row = report.to_frame("layer").iloc[layer]
        assert row["kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert row["loss_change"] == pytest.approx(
            float(sum(loss[1]) - sum(loss[0])) / 92, rel=1e-2
        )
    assert report.kl.min() > 0


def test_targets_choose_the_scored_positions() -> None:
    model = KINDS["llama"]()
    targets = torch.full_like(ids, -100)
    targets[:, 5] = ids[:, 6]
    report = measure(model, output=True, on=["qk"], targets=targets, layers=[1])
    clean, frozen = by_hand(model, 1, 1.0, q_clean=False)
    p, q = (x["logits"][:, 5].double().log_softmax(-1) for x in (clean, frozen))
    np.testing.assert_allclose(report.kl[0, 0], (p.exp() * (p - q)).sum(-1), rtol=1e-3)
    assert report.positions.tolist() == [1, 1, 1, 1]


# -- the norm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_the_norm_found_is_the_module_s(name: str, dtype: torch.dtype) -> None:
    model = {**models.TINY, "gemma2": tiny_gemma2}[name]().to(dtype)
    with torch.no_grad():
        norms = inner_norms(model, attention_sites(model).layers, short_input(model, 1, set()))
    room = 8 * torch.finfo(dtype).eps
    for layer, norm in enumerate(norms):
        gain, bias, centred, eps = raw_norm(model, layer)
        torch.testing.assert_close(norm.gain, gain, rtol=room, atol=room * float(bias.abs().max()))
        torch.testing.assert_close(norm.bias, bias, rtol=0, atol=0)
        assert norm.centred == centred
        assert norm.eps == pytest.approx(eps, rel=0.1, abs=2e-8)
        assert norm.after == f"blocks.{layer}.ln1.hook_out"


def tiny_bert() -> Any:
    config = BertConfig(
        vocab_size=models.VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=models.N_CTX,
    )
    return models._bridge(BertForMaskedLM, config)


def tiny_olmo2() -> Any:
    return models._bridge(Olmo2ForCausalLM, Olmo2Config(**models._llama_like({})))


def random_of(placement: str) -> Any:
    sizes = {"d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 2, "n_ctx": 32}
    cfg = QKVNormConfig(placement=placement, d_vocab=models.VOCAB, **sizes)
    return to_bridge(QKVNormTransformer(cfg).eval())


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("none", lambda: random_of("none")),
        ("qkv", lambda: random_of("qkv")),
        ("bert", tiny_bert),
        ("olmo2", tiny_olmo2),
    ],
)
def test_models_without_a_norm_before_attention_are_refused_by_name(name: str, build: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="the norm in front of the attention") as caught:
        measure(build(), models.tokens(batch=1, pos=8))
    assert caught.value.layer == 0
    assert "none before q and k" in str(caught.value)


def test_a_norm_of_another_form_is_refused() -> None:
    model = KINDS["llama"]()
    bent = lambda y, hook: y + 0.05 * y.square()  # noqa: E731
    edit = [("blocks.1.ln1.hook_out", bent)]
    refused = pytest.raises(UnsupportedModelError, match=r"layer 1: .* roundings off")
    with model.hooks(fwd_hooks=edit), refused:
        measure(model)
    measure(model, batch_size=2)


# -- manners ---------------------------------------------------------------------------------------


def same(a: InterferenceReport, b: InterferenceReport) -> None:
    assert a.settings == b.settings
    assert a.tokens == b.tokens
    for f in fields(a):
        x = getattr(a, f.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, getattr(b, f.name), err_msg=f.name)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    report = measure(KINDS["gpt2"](), constants=[1.0, 2.0], output=True)
    same(report, InterferenceReport.load(report.save(tmp_path / "deep" / "report.safetensors")))
    other = tmp_path / "other"
    other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="wanted a report of interference"):
        InterferenceReport.load(other)


def test_parts_of_a_corpus_merge_to_the_whole() -> None:
    model = KINDS["llama"]()
    whole = measure(model, batch_size=1, output=True)
    first = measure(model, ids[:1], batch_size=1, output=True)
    later = measure(model, ids[1:], batch_size=1, output=True, first_prompt=1)
    same(whole, first.merge(later))
    with pytest.raises(ValueError, match="starts at prompt 1"):
        first.merge(first)
    other = measure(model, ids[1:], first_prompt=1, sparse=0.9, output=True)
    with pytest.raises(ValueError, match="equal settings"):
        first.merge(other)


def test_prompts_of_several_lengths_are_measured_as_if_alone() -> None:
    model = KINDS["llama"]()
    prompts = [row[: 10 + 4 * (i % 2)].tolist() for i, row in enumerate(ids)]
    together = measure(model, prompts)
    for i, prompt in enumerate(prompts):
        alone = measure(model, [prompt], first_prompt=i)
        for name in ("rows", "factored", "permuted", "loose"):
            axis = 3 if name == "permuted" else 4 if name == "loose" else 2
            got = getattr(together, name).take([i], axis)
            np.testing.assert_array_equal(got, getattr(alone, name), err_msg=name)
        np.testing.assert_allclose(together.predicted[:, :, [i]], alone.predicted, atol=1e-4)


def test_the_model_is_left_as_found(unchecked: None) -> None:
    model = models.tiny_gpt2()
    model.train()
    model.blocks[0].ln1.eval()
    model.add_hook("blocks.0.hook_in", lambda tensor, hook: None)
    model(ids)  # transformers sets itself up at the first pass
    before = Found(model)
    measure(model, output=True)
    before.assert_same(Found(model))
    with pytest.raises(ValueError, match="frozen at 1e-42"):
        measure(model, constants=[1e-42])
    before.assert_same(Found(model))


@pytest.mark.parametrize("option", ["spare_first", "output"])
def test_a_text_is_no_boolean(unchecked: None, option: str) -> None:
    with pytest.raises(TypeError, match=f"{option}: wanted True or False; got 'no'"):
        measure(models.tiny_llama(), **{option: "no"})


def test_targets_that_nothing_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="targets: wanted output=True"):
        measure(models.tiny_llama(), targets=ids)


def test_scores_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="norm frozen at 1e-42 times its median; got NaN or inf"):
        measure(models.tiny_llama(), constants=[1e-42])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"constants": []}, "constants: wanted positive numbers"),
        ({"constants": [1.0, 1.0]}, "each once"),
        ({"constants": [0.0]}, "constants: wanted positive"),
        ({"constants": [math.nan]}, "constants: wanted positive"),
        ({"on": ["v"]}, "on: wanted one of"),
        ({"on": []}, "on: wanted some of"),
        ({"sparse": 1.5}, "sparse: wanted"),
        ({"draws": -1}, "draws: wanted an integer >= 0; got -1"),
        ({"layers": [7]}, "layers: wanted one of"),
        ({"batch_size": 0}, "batch_size: wanted"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measure(models.tiny_llama(), **options)


def test_frames_and_words(unchecked: None) -> None:
    report = measure(KINDS["gpt2"](), constants=[1.0, 2.0])
    frame = report.to_frame()
    assert len(frame) == 2 * 2 * 2 * 4
    assert frame.loc[0, "label"] == "L0H0"
    pooled = report.to_frame("model")
    each = frame[(frame["on"] == "k") & (frame["constant"] == 1)]
    weighted = (each["moved"] * each["rows"]).sum() / each["rows"].sum()
    assert pooled.loc[0, "moved"] == pytest.approx(weighted)
    assert set(report.to_frame("layer")["label"]) == {"L0", "L1"}
    with pytest.raises(ValueError, match="by: wanted"):
        report.to_frame("token")  # type: ignore[arg-type]
    said = report.summary()
    assert f"{pooled.loc[0, 'moved']:.2%}" in said
    assert "its median" not in said
    assert repr(report) == said


def test_no_sparse_row_is_said_in_words() -> None:
    report = measure(models.tiny_llama(qk_scale=0.01))
    assert report.rows.sum() == 0
    assert "No row has a maximum >= 0.95" in report.summary()
    assert report.to_frame("model")["moved"].isna().all()
