"""Interference against forward passes made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hooks import attention_sites
from hooks.measures.interference.count import shuffles
from tests.support import models
from tests.support.interference import KINDS, ids, long_and_short, measure, raw_norm
from tests.support.watching import (
    attn,
    tiny_opt,
    watch,
)


def by_hand(
    model: Any,
    layer: int,
    constant: float,
    *,
    q_clean: bool,
    spare_first: bool = False,
    part: str = "scale",
    outliers: int = 3,
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
    if part != "scale":
        for row, mine in zip(c, x, strict=True):
            order = mine[1:].square().mean(0).argsort()
            few, many = order[-outliers:], order[:-outliers]
            own, frozen = (many, few) if part == "outliers" else (few, many)
            add = (eps * mine.shape[1], 0.0) if part == "outliers" else (0.0, eps * mine.shape[1])
            left = mine[:, own].square().sum(1) + add[0]
            size = constant * (mine[:, frozen].square().sum(1) + add[1]).sqrt().quantile(0.5)
            row[:] = ((left + size.square()) / mine.shape[1]).sqrt()
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


@pytest.mark.parametrize("part", ["outliers", "rest"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_part_of_the_scale_by_hand(name: str, part: Any) -> None:
    model = KINDS[name]()
    options: dict[str, Any] = {"part": part, "outliers": 5, "sparse": 0.6}
    report = measure(model, constants=[1.0, 3.0], on="k", **options)
    seen = 0
    for layer in range(2):
        for j, constant in enumerate((1.0, 3.0)):
            hand = by_hand(model, layer, constant, q_clean=True, part=part, outliers=5)
            least, most = counted(*hand, layer, 0.6)["loose"]
            assert (least <= report.loose[0, j, layer]).all()
            assert (report.loose[0, j, layer] <= most).all()
            seen += int(least.sum())
    assert seen >= 5
    whole = measure(model, constants=[1.0, 3.0], on="k", sparse=0.6)
    assert (report.loose != whole.loose).any()
    assert report.settings != whole.settings
    assert "; the scale of the norm before" in whole.summary()
    assert f"{'all but ' * (part == 'rest')}the 5 outlier dimensions" in report.summary()


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
