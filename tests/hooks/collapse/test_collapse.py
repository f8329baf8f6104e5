"""The collapse probe against forward passes with the noise really in them, and its manners."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooks import LAWS, NormNoise, UnsupportedModelError, attention_sites, collapse_probe
from hooks.collapse import reduce
from hooks.collapse.reduce import LayerReducer, Workers
from hooks.collapse.report import CollapseReport
from hooks.collapse.settings import ProbeSettings
from hooks.collapse.tally import Tally
from hooks.sites.types import LayerSites
from qkvnorm_lens.models.config import ARCHITECTURE as OURS
from tests.oracles import probability as reference
from tests.oracles.agreement import compare
from tests.support import builders, models
from tests.support.marks import slowly
from tests.support.watching import (
    Found,
    attn,
    shape_checks_off,
    tiny_gemma2,
    tiny_mamba,
    tiny_opt,
    watch,
)

ids = models.tokens()
SIGMAS = [0.1, 0.2, 0.3, 0.5]
ALL = {**models.TINY, "gemma2": tiny_gemma2}


@pytest.fixture
def unchecked() -> Iterator[None]:
    with shape_checks_off():
        yield


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest) -> Any:
    return ALL[request.param]()


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.tiny_llama()


def probe(model: Any, tokens: Any = ids, **options: Any) -> CollapseReport:
    return collapse_probe(model, tokens, progress=False, **({"draws": 2} | options))


# -- against the model itself -----------------------------------------------------------------


def real_counts(
    model: Any, layer: int, noise: NormNoise, sparse: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows that collapse in a forward pass with this noise, per head and kind (content, sink).

    Loose and strict, each as a least and a largest number: rows whose margin lies within
    rounding count for the second only.
    """
    scores, pattern = attn(layer, "attn_scores"), attn(layer, "pattern")
    clean = watch(model, ids, [scores, pattern])
    noisy = watch(model, ids, [scores, pattern], noise.hooks(model))
    star = clean[scores].argmax(-1, keepdim=True)
    rows = clean[pattern].amax(-1) >= sparse
    rows &= (clean[scores] > -1e30).sum(-1) > 1
    w = noisy[scores].double()
    own = w.gather(-1, star).squeeze(-1)
    lead = w.scatter(-1, star, -math.inf).amax(-1) - own
    near = lead.abs() < 1e-4 * (1 + own.abs())
    moved = rows & (lead > 0)
    top = noisy[pattern].amax(-1)
    out = {}
    for name, surely, maybe in (
        ("loose", moved & ~near, moved | (rows & near)),
        (
            "strict",
            moved & ~near & (top > sparse + 1e-4),
            (moved | (rows & near)) & (top > sparse - 1e-4),
        ),
    ):
        out[name] = tuple(
            np.stack(
                [
                    (x & (star.squeeze(-1) != 0)).sum((0, 2)),
                    (x & (star.squeeze(-1) == 0)).sum((0, 2)),
                ],
                -1,
            )
            for x in (surely, maybe)
        )
    return out


def assert_sample_is_real(model: Any, *, moves: int, **options: Any) -> None:
    sigma, sparse = options.pop("sigma", 0.35), options.pop("sparse", 0.95)
    report = probe(
        model, sigmas=[sigma], method="sample", draws=3, seed=7, sparse=sparse, **options
    )
    how = {k: v for k, v in options.items() if k in ("law", "shared")}
    doubtful = seen = 0
    for index, layer in enumerate(report.settings.layers):
        for draw in range(3):
            noise = NormNoise(
                sigma=sigma, on=report.settings.on, layers=(layer,), seed=7, draw=draw, **how
            )
            for name, (least, most) in real_counts(model, layer, noise, sparse).items():
                got = getattr(report, f"{name}_draws")[0, draw, index]
                got = np.round(got).astype(int)
                assert (least <= got).all(), (layer, draw, name)
                assert (got <= most).all(), (layer, draw, name)
                doubtful += int((most - least).sum())
                seen += int(got.sum()) if name == "loose" else 0
    assert seen >= moves
    assert doubtful <= 0.02 * seen + 2


def test_sampled_counts_are_those_of_real_forward_passes(model: Any) -> None:
    assert_sample_is_real(model, moves=20, on="qk")


@pytest.mark.parametrize("shared", ["heads", "kv", "token"])
def test_sampled_counts_are_real_for_shared_factors(llama: Any, shared: Any) -> None:
    assert_sample_is_real(llama, moves=100, on="qkv", shared=shared)


@pytest.mark.parametrize(("law", "sigma"), [("gaussian", 0.2), ("lognormal", 0.8)])
def test_sampled_counts_are_real_for_other_laws(llama: Any, law: str, sigma: float) -> None:
    assert_sample_is_real(llama, moves=20, law=law, sigma=sigma)


def test_scores_that_no_hook_shows_are_read_at_the_softmax() -> None:
    model = tiny_opt()
    assert all(sites.tapped for sites in attention_sites(model))
    assert_sample_is_real(model, moves=5)


@pytest.mark.parametrize("on", ["q", "qk"])
@pytest.mark.parametrize("method", ["exact", "sample"])
def test_factors_above_two_count(on: str, method: Any) -> None:
    """With a bias a query twice and more as long moves rows that no half-width below 1 moves.

    The built example: scores and biases are drawn so that the bias decides, 1.5 against a gap
    of 0.5 and less, and what the probe counts is held against the definition.
    """
    sites = attention_sites(models.tiny_bloom()).layer(0)
    n_pos, draws, sigma = 6, 200, 2.5
    generator = torch.Generator().manual_seed(0)
    s = 0.1 * torch.randn(1, 4, n_pos, n_pos, generator=generator)
    bias = torch.zeros_like(s)
    bias[..., 0] = 1.5
    s[..., 0], s[..., 1] = 0.0, 0.5  # 1.5 against 0.5: only f_q > 3 helps a query alone
    mask = torch.ones(n_pos, n_pos).tril().bool()
    w = (s + bias).masked_fill(~mask, -torch.inf)
    settings = ProbeSettings(
        sigmas=(sigma,), on=on, law="lognormal", method=method, shared="none", sparse=0.1,
        layers=(0,), draws=draws, seed=3, keep=999,
    )  # fmt: skip
    tally = Tally(settings, (sites,), 1)
    noise = NormNoise(sigma=sigma, on=on, law="lognormal", seed=3)
    LayerReducer(tally, 0, sites, noise, [0], Workers()).add(w, w.softmax(-1), s)
    moved = 0
    for draw in range(draws):
        how = {"layer": 0, "n_heads": 4, "prompts": [0], "n_pos": n_pos}
        at = replace(noise, draw=draw)
        f = at.factors(role="q", **how).transpose(1, 2)[..., None]
        if "k" in on:
            f = f * at.factors(role="k", **how).transpose(1, 2)[:, :, None, :]
        noisy = (f * s + bias).masked_fill(~mask, -torch.inf)
        moved += int((noisy.argmax(-1) != 0).sum())
    assert moved > 200
    rate = float(tally.sums["loose"].sum()) / int(tally.rows.sum())
    wanted = moved / draws / int(tally.rows.sum())
    assert rate == pytest.approx(wanted, abs=1e-9 if method == "sample" else 0.15 * wanted)


def test_sampled_counts_are_real_where_a_user_edits_q() -> None:
    """What a hook of the user's does to q is part of the model."""
    model = models.tiny_llama()
    model.hook_dict[attn(0, "q")].add_hook(lambda q, hook: q + 0.7)
    plain = probe(models.tiny_llama(), sigmas=[0.3])
    assert not np.array_equal(plain.rows, probe(model, sigmas=[0.3]).rows)
    assert_sample_is_real(model, moves=50)


def test_exact_and_sampled_agree_over_the_whole_family(model: Any) -> None:
    tokens = models.tokens(6, 32)
    exact = probe(model, tokens, sigmas=SIGMAS, draws=0)
    sampled = probe(model, tokens, sigmas=SIGMAS, draws=60, method="sample")
    assert exact.n_sparse > 200
    assert exact.to_frame("model")["loose"].iloc[1] > 0
    for name in ("loose", "centred"):
        agreement = compare(exact, sampled, name)
        assert agreement.cells >= 4
        assert agreement.events > 500
        assert agreement.holds, agreement


@pytest.mark.parametrize(
    ("name", "law", "sigmas"),
    [
        ("llama", "gaussian", [0.1, 0.2]),
        ("llama", "lognormal", [0.3, 2.0]),
    ],
)
def test_exact_and_sampled_agree_under_other_laws(name: str, law: str, sigmas: list[float]) -> None:
    built = models.TINY[name]()
    exact = probe(built, sigmas=sigmas, law=law, draws=0)
    sampled = probe(built, sigmas=sigmas, law=law, draws=150, method="sample")
    agreement = compare(exact, sampled)
    assert agreement.events > 200
    assert agreement.holds, agreement


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "sigma", "on"),
    [("gaussian", 0.2, "qk"), ("lognormal", 1.5, "qk"), ("lognormal", 1.5, "q")],
)
def test_exact_and_sampled_agree_with_a_bias_under_other_laws(
    law: str, sigma: float, on: str
) -> None:
    bloom, tokens = models.tiny_bloom(), ids[:2, :10]
    exact = probe(bloom, tokens, sigmas=[sigma], law=law, draws=0, on=on)
    sampled = probe(bloom, tokens, sigmas=[sigma], law=law, draws=400, method="sample", on=on)
    agreement = compare(exact, sampled)
    assert exact.n_sparse >= 10
    assert agreement.events > 20
    assert agreement.holds, agreement


def test_exact_counts_are_recomputed_from_the_cache(llama: Any) -> None:
    """Every column of the frame from run_with_cache, numpy and a quadrature of the tests' own."""
    sigma = 0.3
    frame = probe(llama, sigmas=[sigma]).to_frame().set_index(["layer", "head"])
    for layer in range(2):
        names = [attn(layer, "attn_scores"), attn(layer, "pattern")]
        seen = watch(llama, ids, names)
        scores, pattern = (seen[n].double().numpy() for n in names)
        for head in range(4):
            plain, centred, content, level = [], [], [], []
            for b in range(3):
                for row in range(1, 24):  # row 0 sees one key
                    if pattern[b, head, row].max() < 0.95:
                        continue
                    w = scores[b, head, row, : row + 1]
                    star = int(w.argmax())
                    p = reference.unbiased_uniform(w[star], np.delete(w, star), sigma)
                    c = w - w.mean()
                    plain.append(p)
                    level.append(w[star])
                    centred.append(reference.unbiased_uniform(c[star], np.delete(c, star), sigma))
                    content += [p] if star else []
            got = frame.loc[(layer, head)]
            assert (got["rows"], got["sinks"]) == (len(plain), len(plain) - len(content))
            for column, values in (
                ("loose", plain),
                ("loose_content", content),
                ("loose_centred", centred),
            ):
                assert got[column] == pytest.approx(np.mean(values), abs=2e-6), column
            assert got["score_level"] == pytest.approx(np.mean(level), rel=1e-5)
            assert got["se"] == 0
    assert frame["loose"].min() > 0
    assert (frame["loose_centred"] - frame["loose"]).abs().max() > 1e-3


def test_values_never_collapse_and_queries_only_with_a_bias(model: Any) -> None:
    for on in ("v", "q", "qv"):
        report = probe(model, sigmas=[0.5], on=on, draws=4)
        frame = report.to_frame("model").iloc[0]
        assert frame["rows"] > 50
        if model.cfg.architecture == "BloomForCausalLM" and "q" in on:
            assert frame["loose"] > 0
            continue
        assert frame[["loose", "strict", "loose_content", "loose_centred"]].tolist() == [0] * 4
        assert report.sigma_at(0.01) == math.inf
        assert len(report.fragile()) == 0
    k, qk, qkv = (probe(model, sigmas=[0.5], on=on).to_frame("model") for on in ("k", "qk", "qkv"))
    assert qk["loose"].equals(qkv["loose"])
    assert k["loose"][0] > 0.05


def test_each_layer_is_perturbed_alone_on_clean_inputs(model: Any) -> None:
    both = probe(model, sigmas=SIGMAS)
    for layer in (0, 1):
        one = probe(model, sigmas=SIGMAS, layers=[layer])
        assert one.settings.layers == (layer,)
        for name in ("rows", "level", "examined", "single_key"):
            assert np.array_equal(getattr(one, name)[0], getattr(both, name)[layer])
        for name in ("loose", "strict", "centred"):
            assert np.array_equal(getattr(one, name)[:, 0], getattr(both, name)[:, layer])


# -- what the numbers do not depend on --------------------------------------------------------


def assert_same_numbers(
    a: CollapseReport, b: CollapseReport, order: list[int] | None = None
) -> None:
    by = list(range(len(a.tokens))) if order is None else order
    assert [a.tokens[i] for i in by] == list(b.tokens)
    for name in ("examined", "single_key", "ties"):
        assert np.array_equal(getattr(a, name)[:, :, by], getattr(b, name)), name
    assert np.array_equal(a.rows[:, :, by], b.rows)
    for name in ("loose", "centred") if order is not None else ("loose", "strict", "centred"):
        np.testing.assert_allclose(getattr(a, name)[:, :, :, by], getattr(b, name), atol=1e-4)


def test_batch_size_does_not_matter(model: Any) -> None:
    for method in ("exact", "sample"):
        whole, single, two = (
            probe(model, sigmas=SIGMAS, batch_size=n, method=method) for n in (8, 1, 2)
        )
        assert_same_numbers(whole, single)
        assert_same_numbers(whole, two)
        assert whole.to_frame("model")["loose"].iloc[-1] > 0.05


def test_order_of_prompts_does_not_matter(model: Any) -> None:
    """Exactly so for exact rates; a draw belongs to the place of a prompt in the corpus."""
    order = [2, 0, 1]
    a, b = (probe(model, t, sigmas=SIGMAS, draws=0) for t in (ids, ids[order]))
    assert_same_numbers(a, b, order)
    assert_frames(a.to_frame("model"), b.to_frame("model"))


def assert_frames(a: Any, b: Any) -> None:
    columns = ["rows", "sinks", "loose", "loose_content", "loose_centred", "score_level"]
    np.testing.assert_allclose(a[columns], b[columns], rtol=1e-5, atol=1e-7)


def test_padding_does_not_matter(model: Any) -> None:
    """Left, right and both; prompts of different lengths, as a list or padded."""
    prompts = [ids[0, :20], ids[1], ids[2, :17]]
    plain = probe(model, [p.tolist() for p in prompts], sigmas=SIGMAS)
    padded, mask = torch.full((3, 29), 5), torch.zeros(3, 29, dtype=torch.long)
    for row, (prompt, first) in enumerate(zip(prompts, (9, 0, 6), strict=True)):
        padded[row, first : first + len(prompt)] = prompt
        mask[row, first : first + len(prompt)] = 1
    got = probe(model, padded, attention_mask=mask, sigmas=SIGMAS)
    assert_same_numbers(plain, got)
    assert got.padding.tolist() == [9, 5, 12]
    assert plain.padding.tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of one word a token, with a pad token of its own."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[UNK]": 2, **{f"w{i}": i for i in range(3, 97)}}
    inner = Tokenizer(kinds.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", unk_token="[UNK]"
    ).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def test_pad_tokens_of_the_tokenizer_are_padding(words: Any) -> None:
    model = models.tiny_llama(tokenizer=words)
    row = ids[:1].clamp(3)
    plain = probe(model, row, sigmas=SIGMAS)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row, torch.zeros(1, 2).long()], 1)
    mask = (padded != 0).long()
    got = probe(model, padded, sigmas=SIGMAS, attention_mask=mask)
    assert_same_numbers(plain, got)
    assert got.padding.tolist() == [5]
    longer = torch.cat([row, row[:, 1:6]], 1)  # without a mask: where other rows have more
    both = probe(model, torch.cat([padded, longer]), sigmas=SIGMAS)
    assert both.padding.tolist() == [5, 0]
    assert both.tokens[0] == plain.tokens[0]
    text = " ".join(f"w{int(i)}" for i in row[0])
    said = probe(model, text, sigmas=SIGMAS, prepend_bos=False)
    assert_same_numbers(plain, said)
    assert said.tokens[0][:2] == tuple(text.split()[:2])
    assert probe(model, [text, "w5 w6"], prepend_bos=True).tokens[1] == ("[BOS]", "w5", "w6")


def test_a_law_of_ones_own_is_refused_by_name(llama: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(LAWS, "mine", LAWS["uniform"])
    with pytest.raises(ValueError, match=r"law: wanted one of .*'uniform'.*got 'mine'"):
        probe(llama, law="mine")


@pytest.mark.parametrize("empty", ["", "  \n", ["w3 w4", ""], [], [[]]])
def test_empty_text_is_refused(words: Any, empty: Any) -> None:
    model = models.tiny_llama(tokenizer=words)
    with pytest.raises((ValueError, TypeError), match=r"wanted (text|one prompt|integer ids).*got"):
        probe(model, empty)


@pytest.mark.parametrize(
    "same",
    [
        lambda: ids[0],
        lambda: ids[:1],
        lambda: ids[0].tolist(),
        lambda: [ids[0]],
        lambda: ids[:1].int(),
        lambda: [ids[0].tolist()],
        lambda: list(ids[0].numpy()),
        lambda: [ids[0].numpy()],
    ],
)
def test_ids_may_come_in_many_forms(llama: Any, same: Callable[[], Any]) -> None:
    assert_same_numbers(probe(llama, ids[:1]), probe(llama, same()))


# -- what is left out -------------------------------------------------------------------------


def test_rows_with_one_key_are_left_out_and_counted(model: Any) -> None:
    report = probe(model)
    assert (report.single_key == 1).all()  # row 0 of each prompt and head
    assert (report.examined == 23).all()
    assert 0 not in report.table.query
    # Row 0 has a maximum of 1: it would count as sparse.
    assert probe(model, ids[:, :2], sparse=1e-9).n_sparse == report.rows[..., 0].size


def test_ties_are_left_out_and_counted() -> None:
    """Without positions a repeated token is attended to twice alike."""
    model = models.tiny_gpt2()
    with torch.no_grad():
        model.pos_embed.original_component.weight.zero_()
    twice = torch.cat([ids[:, :8], ids[:, :8]], 1)
    report = probe(model, twice, layers=[0], sparse=0.3)
    names = [attn(0, "attn_scores"), attn(0, "pattern")]
    seen = watch(model, twice, names)
    w, top = seen[names[0]], seen[names[1]].amax(-1)
    tied = (w == w.amax(-1, keepdim=True)).sum(-1) > 1
    chosen = (top >= 0.3) & (torch.arange(16) > 0)
    wanted = (tied & chosen).sum(-1).T
    assert wanted.sum() > 20
    assert np.array_equal(report.ties[0], wanted)
    assert np.array_equal(report.rows[0].sum(-1), (chosen & ~tied).sum(-1).T)
    assert report.to_frame("model")["loose"].notna().all()


# -- the model is left as found ---------------------------------------------------------------


def _hooked(model: Any) -> list[str]:
    """Two hooks of a user's on one point, in order; returns what they write."""
    calls: list[str] = []
    point = model.hook_dict[attn(0, "attn_scores")]
    point.add_hook(lambda w, hook: calls.append("first"))
    point.add_hook(lambda w, hook: calls.append("second"))
    return calls


def _raising(model: Any, error: BaseException, when: list[bool]) -> None:
    def hook_fn(tensor: Tensor, hook: Any) -> None:
        if when and tensor.shape[0] == 3:
            raise error

    model.hook_dict[attn(1, "pattern")].add_hook(hook_fn)


@pytest.mark.parametrize("error", [None, RuntimeError("mine"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("method", ["exact", "sample"])
def test_the_model_is_left_as_found(
    error: BaseException | None, method: Any, unchecked: None
) -> None:
    model = models.tiny_gpt2()
    calls = _hooked(model)
    when: list[bool] = []
    if error is not None:
        _raising(model, error, when)
    clean = model(ids).detach()  # transformers sets itself up at the first pass
    model.train()
    model.blocks[1].eval()
    next(iter(model.parameters())).requires_grad_(False)
    before = Found(model)
    assert before.training.count(True) > 5 < before.training.count(False)
    when.append(True)
    if error is None:
        probe(model, method=method)
    else:
        # What a hook of the user's raises is named with the hook; an interrupt goes through.
        kind = ValueError if isinstance(error, Exception) else type(error)
        with pytest.raises(kind, match=r"hooks: wanted|^$|mine"):
            probe(model, method=method)
    Found(model).assert_same(before)
    when.clear()
    calls.clear()
    with torch.no_grad():
        after = model.eval()(ids)
    assert calls == ["first", "second"]
    assert torch.equal(after, clean)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_grad_mode_does_not_matter(context: Any, unchecked: None) -> None:
    with context():
        model = models.tiny_llama()
        model(ids)  # transformers sets itself up at the first pass
        before = Found(model)
        report = probe(model)
        Found(model).assert_same(before)
    assert_same_numbers(report, probe(models.tiny_llama()))


def test_gradients_flow_as_before(llama: Any) -> None:
    probe(llama)
    llama(ids).square().sum().backward()
    assert all(p.grad is not None for p in llama.parameters())
    llama.zero_grad()


def test_logits_and_generation_are_as_before(model: Any) -> None:
    """The pass ends early by an exception: nothing of it may stay in the model."""

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = model(ids)
        out = model.generate(
            ids[:2, :5], max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False,
            return_type="tokens",
        )  # fmt: skip
        return logits, out

    before = run()
    probe(model)
    after = run()
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_probe_in_training_mode_is_a_probe_in_eval_mode() -> None:
    model = models.tiny_gpt2()
    calm = probe(model)
    model.train()
    assert_same_numbers(calm, probe(model))
    assert model.training


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "qwen3"])
def test_compatibility_mode_and_double_precision_agree(name: str) -> None:
    plain, compatible, double = (models.TINY[name]() for _ in range(3))
    compatible.enable_compatibility_mode()
    double.to(torch.float64)
    reports = [probe(m, sigmas=SIGMAS) for m in (plain, compatible, double)]
    for other in reports[1:]:
        assert_frames(reports[0].to_frame("model"), other.to_frame("model"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    for name in ("llama", "bloom"):
        full = probe(models.TINY[name]()).to_frame("model")
        half = probe(models.TINY[name]().to(dtype)).to_frame("model")
        assert abs(half["rows"][0] - full["rows"][0]) < 0.05 * full["rows"][0]
        np.testing.assert_allclose(half["loose"], full["loose"], atol=0.02)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": [-0.1]}, r"sigmas: wanted a finite number >= 0; got -0\.1"),
        ({"sigmas": [0.1, 0.6]}, r"wanted < 0\.57735 for uniform noise .*got 0\.6"),
        ({"sigmas": [0.25], "law": "gaussian"}, r"wanted <= 0\.2 for gaussian noise"),
        ({"sigmas": []}, "sigmas: wanted one or more; got none"),
        ({"sigmas": [0.2, 0.1]}, r"ascending and distinct; got \[0\.2, 0\.1\]"),
        ({"layers": [5]}, r"wanted one of the attention layers \[0, 1\]; got 5"),
        ({"layers": [-1]}, "got -1"),
        ({"layers": []}, "layers: wanted one or more"),
        ({"layers": [0, 0]}, "each once; got"),
        ({"on": "x"}, r"on: wanted some of 'q', 'k', 'v', each once; got 'x'"),
        ({"law": "cauchy"}, r"law: wanted one of .*got 'cauchy'"),
        ({"method": "guess"}, "method: wanted one of .*; got 'guess'"),
        ({"shared": "all"}, "shared: wanted one of .*got 'all'"),
        ({"draws": -1}, "draws: wanted an integer >= 0; got -1"),
        ({"draws": 1, "method": "sample"}, "draws: wanted an integer >= 2; got 1"),
        ({"batch_size": 0}, "batch_size: wanted an integer >= 1; got 0"),
        ({"keep": 0}, "keep: wanted an integer >= 1; got 0"),
        ({"query_block": 0}, "query_block: wanted an integer >= 1; got 0"),
        ({"sparse": 0.0}, r"sparse: wanted a maximum in \(0, 1\]; got 0"),
        ({"sparse": 1.5}, "got 1.5"),
        ({"seed": -1}, "seed: wanted an integer >= 0; got -1"),
        (
            {"attention_mask": torch.ones(3, 5).long()},
            r"wanted the shape .*\[3, 24\]; got \[3, 5\]",
        ),
        ({"attention_mask": torch.zeros(3, 24).long()}, "a real token in every row; got none in 0"),
        ({"tokens": torch.zeros(1, 65).long()}, r"prompt 0: wanted at most 64 tokens .*got 65"),
        ({"tokens": [[1, 2], [3] * 70]}, r"prompt 1: wanted at most 64 tokens .*got 70"),
        ({"tokens": ids[:, :1]}, "prompt 0: wanted at least 2 tokens .*got 1"),
        ({"tokens": ids + 50}, "prompt 0: wanted token ids from 0 to 96; got"),
        ({"tokens": ids - 50}, "prompt 0: wanted token ids from 0 to 96; got -"),
        ({"tokens": ids[:0]}, "tokens: wanted one token or more; got shape"),
        ({"tokens": ids.float()}, "tokens: wanted integer ids .*got torch.float32"),
        ({"tokens": ids[None]}, r"tokens: wanted integer ids .*of shape \[1, 3, 24\]"),
        ({"tokens": 5}, "tokens: wanted text or token ids; got int"),
        ({"tokens": None}, "tokens: wanted text or token ids; got NoneType"),
    ],
)
def test_bad_input_is_refused(
    llama: Any, options: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        probe(llama, **({"tokens": ids} | options))


def _quantised(model: Any) -> Any:
    linear = model.original_model.model.layers[0].mlp.original_component.down_proj
    linear = getattr(linear, "original_component", linear)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def _meta(model: Any) -> Any:
    model.original_model.to("meta")
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny_mamba, "attention sites: wanted .*; got no attention layer"),
        (lambda: _quantised(models.tiny_llama()), "quantised weights .*int8"),
        (lambda: _meta(models.tiny_llama()), "got weights on the meta device"),
    ],
    ids=["mamba", "int8", "meta"],
)
def test_models_that_can_not_be_probed_are_refused(build: Any, message: str) -> None:
    model = build()
    for call in (attention_sites, probe, NormNoise(sigma=0.1).hooks):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            call(model)
        assert caught.value.wanted
        assert caught.value.got


# -- the self-check ---------------------------------------------------------------------------


def _refusal(model: Any) -> UnsupportedModelError:
    with pytest.raises(UnsupportedModelError) as caught:
        attention_sites(model)
    with pytest.raises(UnsupportedModelError):
        probe(model)  # nothing is reported for it
    error = caught.value
    assert f"layer {error.layer}: {error.check}: wanted {error.wanted}; got {error.got}" == str(
        error
    )
    return error


def test_a_wrong_key_head_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(self: LayerSites) -> tuple[int, ...]:
        return tuple(head % self.n_kv_heads for head in range(self.n_heads))

    monkeypatch.setattr(LayerSites, "kv_head_of", property(interleaved))
    for name in ("llama", "qwen3"):
        error = _refusal(models.TINY[name]())
        assert error.layer == 0
        assert "k-noise" in error.check
    attention_sites(models.tiny_gpt2())  # one key head for each: the wrong map is the right one


def test_an_ignored_soft_cap_is_noticed() -> None:
    model = tiny_gemma2()
    model.cfg.attn_scores_soft_cap = 0.0
    assert "noise" in _refusal(model).check


def _bent(w: Tensor) -> Tensor:
    """Masks stay. A map that commutes with positive factors, relu say, would be no sabotage."""
    return torch.where(w > -1e30, w.sign() * w.abs().sqrt(), w)


SABOTAGE: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "pattern rolled": (attn(1, "pattern"), lambda a: a.roll(1, -2), "pattern"),
    "pattern flat": (attn(1, "pattern"), lambda a: a.sqrt(), "pattern"),
    "scores bent": (attn(1, "attn_scores"), _bent, "noise"),
    "scores frozen": (attn(1, "attn_scores"), lambda w: w[:1].expand_as(w).clone(), ""),
}


@pytest.mark.parametrize("how", SABOTAGE)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_sabotage_is_noticed(how: str, name: str) -> None:
    point, edit, check = SABOTAGE[how]
    model = models.TINY[name]()
    model.hook_dict[point].add_hook(lambda tensor, hook: edit(tensor))
    error = _refusal(model)
    assert error.layer == 1
    assert re.search(check, error.check), error


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_another_z_leaves_q_and_k_and_refuses_v(name: str) -> None:
    model = models.TINY[name]()
    model.hook_dict[attn(1, "z")].add_hook(lambda z, hook: z + 1.0)
    assert [sites.averaging for sites in attention_sites(model)] == ["plain", "unverified"]
    assert NormNoise(sigma=0.1, on="qk").hooks(model)
    assert NormNoise(sigma=0.1, on="v", layers=(0,)).hooks(model)
    with pytest.raises(UnsupportedModelError, match="layer 1: noise on v"):
        NormNoise(sigma=0.1, on="v").hooks(model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_a_gate_on_z_is_known(name: str) -> None:
    model = models.TINY[name]()
    gate = torch.rand(8) + 0.5
    model.hook_dict[attn(0, "z")].add_hook(lambda z, hook: z * gate)
    assert [sites.averaging for sites in attention_sites(model)] == ["gated", "plain"]


def test_sabotage_is_noticed_although_another_hook_was_fine() -> None:
    """A hook that came and went must not vouch for one that happens to lie at its address."""
    model = models.tiny_gpt2()
    point = model.hook_dict[attn(0, "attn_scores")]
    vouched = set()
    for _ in range(20):
        point.add_hook(lambda w, hook: w)
        vouched.add(id(point.fwd_hooks[0]))
        attention_sites(model)
        model.reset_hooks()
    met = 0
    for _ in range(2000):
        point.add_hook(lambda w, hook: _bent(w))
        if id(point.fwd_hooks[0]) in vouched:
            met += 1
            with pytest.raises(UnsupportedModelError):
                attention_sites(model)
        model.reset_hooks()
        if met == 3:
            break


def test_doubled_scores_are_another_model_not_a_broken_one() -> None:
    """softmax follows the doubled scores, and noise scales them: all that the check asks."""
    model = models.tiny_llama()
    plain = attention_sites(model).layer(0)
    model.hook_dict[attn(0, "attn_scores")].add_hook(
        lambda w, hook: torch.where(w > -1e30, 2 * w, w)
    )
    doubled = [2 * scale for scale in plain.score_scale]
    assert attention_sites(model).layer(0).score_scale == pytest.approx(doubled)
    assert_sample_is_real(model, moves=50)


class _Forwards:
    __slots__ = ("count",)  # what a hook keeps in attributes is part of the fingerprint

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.original_model.register_forward_pre_hook(self._add)

    def _add(self, module: Any, args: Any) -> None:
        self.count += 1


def test_the_check_is_remembered_and_redone() -> None:
    model = models.tiny_llama()
    forwards = _Forwards(model)
    first = attention_sites(model)
    once = forwards.count
    assert 1 <= once <= 8  # cheap
    assert attention_sites(model) is first
    assert forwards.count == once
    probe(model)
    assert forwards.count == once + 1
    NormNoise(sigma=0.1).hooks(model)
    assert forwards.count == once + 1

    def redone(change: Callable[[], object]) -> None:
        attention_sites(model)
        before = forwards.count
        change()
        attention_sites(model)
        assert forwards.count > before, change
        after = forwards.count
        attention_sites(model)
        assert forwards.count == after

    redone(lambda: model.to(torch.bfloat16))
    redone(lambda: model.to(torch.float64))
    redone(lambda: model.enable_compatibility_mode())
    # Hooks of a user's on the attention may do anything: the check looks again for each.
    redone(lambda: model.hook_dict[attn(0, "q")].add_hook(lambda q, hook: q))
    redone(lambda: model.hook_dict[attn(0, "q")].add_hook(lambda q, hook: q * 1.5))
    model.reset_hooks()
    # Noise of ours rests during a check and is no reason for another.
    with NormNoise(sigma=0.3).applied(model):  # once, cached steps are tried
        attention_sites(model)
    before = forwards.count
    with NormNoise(sigma=0.3).applied(model), NormNoise(sigma=0.1, seed=1).applied(model):
        attention_sites(model)
    assert forwards.count == before
    fresh = models.tiny_llama()
    assert attention_sites(fresh) is not first


def test_the_check_says_what_it_measured(model: Any) -> None:
    sites = attention_sites(model)
    table = sites.check
    assert set(table["layer"]) == {0, 1}
    for role in "qkv":
        mine = table[table["check"].str.contains(f"{role}-noise")]
        assert set(mine["layer"]) == {0, 1}
        assert (mine["effect"] > 0.01).all()
        assert (mine["error"] < 1e-4).all()
    assert len(sites) == 2
    architecture = model.cfg.architecture
    for layer in sites:
        assert layer.has_bias == (architecture == "BloomForCausalLM")
        assert layer.soft_cap == (20 if architecture == "Gemma2ForCausalLM" else 0)
        assert layer.score_scale == pytest.approx([1 / math.sqrt(8)] * 4, rel=1e-4)
        assert layer.scores_editable
        assert layer.v.shield == "none"
        assert layer.q.shield == ("removed" if architecture == "Qwen3ForCausalLM" else "none")


def test_the_check_leaves_the_model_as_found(model: Any, unchecked: None) -> None:
    with torch.no_grad():
        model(ids)
    before = Found(model)
    hook = model.hook_dict[attn(0, "q")]
    hook.add_hook(lambda q, hook: q)
    after_adding = Found(model)
    attention_sites(model)
    Found(model).assert_same(after_adding)
    model.reset_hooks()
    Found(model).assert_same(before)


def test_an_effect_that_drowns_is_no_pass() -> None:
    """With q and k at zero nothing can be seen: that must not count as verified."""
    model = models.tiny_llama(qk_scale=0.0)
    error = _refusal(model)
    assert "not verifiable" in error.check


def test_scores_too_small_for_the_pattern_show_the_noise_themselves() -> None:
    sites = attention_sites(models.tiny_llama(qk_scale=1e-12))
    assert sites.check["check"].str.startswith("scores under").any()


def test_work_behind_the_models_back_counts_the_same(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: every layer is copied and reduced while the model goes on."""
    plain = probe(model, draws=3)
    started: list[int] = []

    def copies(tensors: list[Tensor]) -> Any:
        started.append(len(tensors))
        held = [x.clone() for x in tensors]
        return lambda: held

    def add(self: reduce.LayerReducer, scores: Tensor, pattern: Any, s: Any) -> None:
        given = [x for x in (scores, pattern, s) if x is not None]
        arrive = copies(given)
        scores.zero_()  # what the model does with its own is no matter
        has = (pattern is not None, s is not None)
        eps = torch.finfo(scores.dtype).eps
        rows = (0, scores.shape[2], scores.shape[3])
        self.workers.later(lambda: self._reduce(arrive(), has, rows, eps))

    monkeypatch.setattr(reduce.LayerReducer, "add", add)
    later = probe(model, draws=3)
    assert len(started) == len(later.settings.layers)
    for name in ("rows", "loose", "strict", "centred", "able", "strict_draws"):
        assert np.array_equal(getattr(plain, name), getattr(later, name)), name


def test_an_error_behind_the_models_back_is_raised(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: reduce.LayerReducer, *given: Any) -> None:
        raise ZeroDivisionError("while it was reduced")

    monkeypatch.setattr(
        reduce.LayerReducer, "add", lambda self, *given: self.workers.later(lambda: broken(self))
    )
    with pytest.raises(ZeroDivisionError, match="while it was reduced"):
        probe(llama)


@pytest.mark.parametrize("block", [*slowly(1), 5, *slowly(24), None])
@pytest.mark.parametrize(
    ("name", "heads"),
    [("OPTForCausalLM", None), ("T5ForConditionalGeneration", None), (OURS, "gqa")],
)
def test_blocks_of_queries_change_nothing(name: str, heads: str | None, block: int | None) -> None:
    """Fused attention, its scores made for some queries at a time: a mask, a bias, is_causal."""
    built = builders.build(name, heads, attn="sdpa")
    tokens = models.tokens(vocab=int(built.model.cfg.d_vocab))
    # A tiny model's attention is flat: what counts as sparse here is little.
    how: dict[str, Any] = {"sparse": 0.3}
    if name.startswith("T5"):
        how["decoder_tokens"] = tokens.flip(1)
    whole = probe(built.model, tokens, query_block=10**6, **how)
    assert whole.n_sparse > 20
    parts = probe(built.model, tokens, query_block=block, **how)
    for report_name in ("examined", "rows", "strict"):
        assert np.array_equal(getattr(whole, report_name), getattr(parts, report_name))
    for report_name in ("loose", "centred", "level"):
        got, wanted = getattr(parts, report_name), getattr(whole, report_name)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    if "decoder_tokens" not in how:  # with a bias the last to be able are so up to rounding
        assert np.array_equal(whole.able, parts.able)
        np.testing.assert_allclose(parts.table.a, whole.table.a, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_runs_under_inference_mode(dtype: torch.dtype) -> None:
    built = models.tiny_gpt2().to(dtype)
    plain = probe(built)
    with torch.inference_mode():
        again = probe(built)
    assert plain.n_sparse > 50
    for name in ("rows", "loose", "strict"):
        assert np.array_equal(getattr(plain, name), getattr(again, name)), name


def test_the_table_is_bounded_and_the_rates_are_not_touched(llama: Any) -> None:
    """Room for the table is what a report may cost, however many layers and sigmas there are."""
    whole, small = probe(llama), probe(llama, keep=20)
    assert len(small.table.a) <= 20 < len(whole.table.a)
    for name in ("rows", "able", "loose", "centred", "strict"):
        assert np.array_equal(getattr(whole, name), getattr(small, name)), name
    rows = ["label", "prompt", "query_pos", "key_pos", "jump_pos", "half_width"]
    n = min(5, len(small.table))
    assert small.fragile(n)[rows].equals(whole.fragile(n)[rows])


@pytest.mark.slow
def test_a_compiled_model_is_probed_as_it_is(unchecked: None) -> None:
    built = models.tiny_gpt2()
    plain = probe(built)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo tells of every hook at which it breaks the graph
        compiled = torch.compile(built)
        with torch.no_grad():
            compiled(ids)
        again = probe(compiled)
    assert any("without torch.compile" in words for words in again.model["given"])
    assert not any("torch.compile" in words for words in plain.model["given"])
    assert np.array_equal(plain.rows, again.rows)
    np.testing.assert_allclose(again.loose, plain.loose, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_scores_that_are_no_numbers_are_refused(bad: float, attn: str) -> None:
    """One token's embedding is broken: no rate of what is left, but an error that names it."""
    built = builders.build("OPTForCausalLM", attn=attn).model
    tokens = models.tokens(vocab=int(built.cfg.d_vocab))
    attention_sites(built)
    tokens[tokens == 7] = 8
    tokens[1, 5] = 7
    with torch.no_grad():
        built.original_model.get_input_embeddings().weight[7] = bad
    with pytest.raises(ValueError, match=r"wanted scores that are finite numbers.*prompt 1$"):
        probe(built, tokens)


def test_a_threshold_of_one_is_the_dtypes_own(unchecked: None) -> None:
    """Rows whose pattern shows 1 are sparse, before and after: the strict rate is no zero."""
    built = models.tiny_llama(qk_scale=60.0)
    report = probe(built, sparse=1, sigmas=[0.2, 0.5], draws=8)
    nearly = probe(built, sparse=0.9999999, sigmas=[0.2, 0.5], draws=8)
    assert report.n_sparse > 50
    rates, others = (r.to_frame("model")["strict"].to_numpy() for r in (report, nearly))
    assert (rates > 0).all()
    np.testing.assert_allclose(rates, others, atol=0.02)
    assert isinstance(report.settings.sparse, float)
