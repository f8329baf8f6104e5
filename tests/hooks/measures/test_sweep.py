"""hooks.sweep: what its numbers are, held against plain passes, and what they can't hang on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import hooks
from hooks import NormNoise, SweepReport
from hooks.measures.sweep.score import UNSCORED, argmax, score
from hooks.noise.streams import draw_uniforms, philox_keys
from tests.support import models
from tests.support.marks import slowly
from tests.support.watching import Found, tiny_bert, tiny_gemma2

SIGMAS = (0.05, 0.2)
ids = models.tokens(3, 17)
METRICS = ("accuracy", "loss", "kl", "top1_agreement")


def double(model: Any) -> Any:
    """In float64, rounding can't hide a wrong factor."""
    return model.double()


@pytest.fixture(scope="module", params=[*models.TINY, "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    return double((models.TINY | {"gemma2": tiny_gemma2})[request.param]())


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return double(models.tiny_gpt2(n_layers=3))


@pytest.fixture(scope="module")
def bert() -> Any:
    return double(tiny_bert())


@pytest.fixture(scope="module")
def t5() -> Any:
    config = T5Config(
        vocab_size=models.VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return double(models.bridge(T5ForConditionalGeneration, config))


def logits(model: Any, tokens: Tensor, noise: NormNoise | None, **options: Any) -> Tensor:
    """A plain pass of one prompt."""
    first = options.pop("first_prompt", 0)
    with torch.no_grad():
        if noise is None:
            return model(tokens, **options)
        fwd_hooks = noise.hooks(model, first_prompt=first)
        return model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **options)


def by_hand(clean: Tensor, noisy: Tensor, targets: Tensor) -> np.ndarray:
    """Sums of accuracy, loss, KL and agreement of one prompt, in numpy float64."""
    here = (targets != UNSCORED).numpy()
    z, w = (x[0].double().numpy()[here] for x in (clean, noisy))
    lp, lq = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (z, w))
    at = targets.numpy()[here]
    return np.array(
        [
            (w.argmax(-1) == at).sum(),
            -lq[np.arange(len(at)), at].sum(),
            (np.exp(lp) * (lp - lq)).sum(),
            (w.argmax(-1) == z.argmax(-1)).sum(),
        ]
    )


def noisy_sums(report: SweepReport, sigma: int, draw: int, prompt: int) -> np.ndarray:
    at = (sigma, draw, prompt)
    return np.array([x[at] for x in (report.correct, report.loss, report.kl, report.agree)])


def shifted(row: Tensor) -> Tensor:
    return torch.cat([row[1:], torch.tensor([UNSCORED])])


def assert_close(a: SweepReport, b: SweepReport) -> None:
    for name in ("positions", "targets", "clean_correct", "correct", "agree"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("clean_loss", "loss", "kl"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-10)


# -- a row of a sweep is a plain pass with that NormNoise -----------------------------------


@pytest.mark.parametrize("batch_size", [1, *slowly(4, 64), 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on": "qk", "rows": "sparse"},
        {"on": "k", "rows": "non-sparse"},
        {"on": "v", "law": "lognormal", "shared": "token", "seed": 2**40},
        {"on": "qk", "layers": (1,)},
    ],
    ids=str,
)
def test_a_row_is_a_plain_pass_with_its_noise(
    model: Any, batch_size: int, options: dict[str, Any]
) -> None:
    report = hooks.sweep(
        model,
        ids,
        sigmas=SIGMAS,
        replicates=2,
        batch_size=batch_size,
        first_prompt=5,
        progress=False,
        **options,
    )
    for prompt, row in enumerate(ids):
        clean = logits(model, row[None], None)
        for s, sigma in enumerate(SIGMAS):
            noise = NormNoise(sigma=sigma, draw=1, **options)
            noisy = logits(model, row[None], noise, first_prompt=5 + prompt)
            expected = by_hand(clean, noisy, shifted(row))
            found = noisy_sums(report, s, 1, prompt)
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
        nothing = by_hand(clean, clean, shifted(row))
        np.testing.assert_allclose(report.clean_loss[prompt], nothing[1], rtol=1e-9)
        assert report.clean_correct[prompt] == nothing[0]


@settings(max_examples=20)
@given(st.data())
def test_uniforms_of_many_places_are_those_of_norm_noise(data: st.DataObject) -> None:
    shared = data.draw(st.sampled_from(["none", "heads", "kv", "token"]))
    noise = NormNoise(sigma=0.1, shared=shared, seed=data.draw(st.integers(0, 2**70)))
    indices = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3)
    prompts, draws = data.draw(indices), data.draw(indices)
    places = [(0, "q"), (7, "k"), (7, "v")]
    n_pos, n_heads = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    many = draw_uniforms(
        noise, places=places, prompts=prompts, draws=draws, n_pos=n_pos, n_heads=n_heads
    )
    for i, (layer, role) in enumerate(places):
        for p, prompt in enumerate(prompts):
            for d, draw in enumerate(draws):
                alone = replace(noise, draw=draw).uniforms(
                    layer=layer, role=role, prompt=prompt, start=0, n_pos=n_pos, n_heads=n_heads
                )
                assert np.array_equal(np.broadcast_to(many[i, p, d], alone.shape), alone)


def test_keys_are_numpys_and_refuse_what_they_cannot_hold() -> None:
    words = np.array([0, 1, 2**32 - 1])
    for seed in (0, 1, 2**32, 2**100 + 7):
        keys = philox_keys(seed, words[:, None], words[None])
        for i, a in enumerate(words):
            for j, b in enumerate(words):
                sequence = np.random.SeedSequence((seed, int(a), int(b)))
                assert (keys[i, j] == sequence.generate_state(2, np.uint64)).all()
    with pytest.raises(ValueError, match=r"below 2\*\*32; got 4294967296"):
        philox_keys(0, np.array([2**32]))


# -- scoring --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([3, 97, 1023, 1024, 1025, 2500]), st.integers(1, 5))
def test_the_first_of_tied_maxima_is_the_arg_max(seed: int, n: int, high: int) -> None:
    z = torch.randint(high, (4, 3, n), generator=torch.Generator().manual_seed(seed)).float()
    assert np.array_equal(argmax(z).numpy(), z.numpy().argmax(-1))


@settings(max_examples=40)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1e-3, 1e-2, 1.0, 100.0]),
    st.sampled_from([4, 60]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_scores_are_those_of_float64_also_for_tiny_and_huge_changes(
    seed: int, change: float, scale: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = scale * torch.randn(1, 5, 1100, generator=generator, dtype=torch.float64) - 30
    delta = change * torch.randn(3, 5, 1100, generator=generator, dtype=torch.float64)
    z = torch.cat([clean, clean + delta + 3 * change]).to(dtype)
    targets = torch.randint(1100, (5,), generator=generator)
    places = (torch.zeros(5, dtype=torch.long), torch.arange(5))
    scored, _ = score(z, places, targets, 4, lambda x: x, None, keep=False)
    exact = z.double().log_softmax(-1).numpy()
    p = np.exp(exact[0])
    for row in range(1, 4):
        kl = (p * (exact[0] - exact[row])).sum(-1)
        # The change is taken before anything is summed: the error is the change's own rounding,
        # far below that of the logits, which the probabilities have relative to their size.
        eps, size = torch.finfo(dtype).eps, float(z.abs().max())
        of_p = 4 * eps * size
        of_reference = 4 * torch.finfo(torch.float64).eps * size
        atol = 8 * eps * change + of_reference
        np.testing.assert_allclose(scored.kl[:, row].numpy(), kl, rtol=of_p, atol=atol)
        loss = -exact[row][np.arange(5), targets.numpy()]
        tight = 1e-12 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(scored.loss[:, row].numpy(), loss, rtol=tight, atol=tight)
        top = (exact[row].argmax(-1) == exact[0].argmax(-1)).astype(float)
        assert np.array_equal(scored.agree[:, row].numpy(), top)


def test_a_token_that_is_ruled_out_changes_nothing() -> None:
    z = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = torch.cat([z, torch.full((3, 4, 2), -torch.inf, dtype=torch.float64)], -1)
    places = (torch.zeros(4, dtype=torch.long), torch.arange(4))
    targets = torch.tensor([1, 5, UNSCORED, 0])
    plain, ruled = (
        score(x, places, targets, 3, lambda x: x, None, keep=False)[0] for x in (z, out)
    )
    assert torch.equal(plain.stacked().isnan(), ruled.stacked().isnan())
    np.testing.assert_allclose(plain.stacked().nan_to_num(), ruled.stacked().nan_to_num())
    assert plain.loss[2].isnan().all()
    assert plain.kl.isfinite().all()


# -- laws of the curve ----------------------------------------------------------------------


def test_without_noise_nothing_changes(gpt2: Any) -> None:
    with_zero = hooks.sweep(gpt2, ids, sigmas=[0.0, 0.1], replicates=2, progress=False)
    without = hooks.sweep(gpt2, ids, sigmas=[0.1], replicates=2, progress=False)
    assert_close(with_zero, without)
    clean = with_zero.to_frame().iloc[0]
    assert (clean.sigma, clean.kl, clean.top1_agreement) == (0, 0, 1)
    assert (clean.accuracy_change, clean.loss_change, clean.se_kl) == (0, 0, 0)


def test_kl_grows_with_the_square_of_small_noise(model: Any) -> None:
    report = hooks.sweep(model, ids, sigmas=[1e-4, 2e-4, 4e-4], replicates=2, progress=False)
    np.testing.assert_allclose(report.kl[1] / report.kl[0], 4, rtol=2e-2)
    np.testing.assert_allclose(report.kl[2] / report.kl[1], 4, rtol=2e-2)
    assert (report.kl > 0).all()


def test_a_norm_over_each_head_removes_noise_at_the_projection() -> None:
    qwen3 = double(models.tiny_qwen3())
    with pytest.warns(UserWarning, match="removed by a norm"):
        shielded = hooks.sweep(
            qwen3, ids, sigmas=[0.2], on="qk", at="projection", replicates=2, progress=False
        )
    bare = hooks.sweep(qwen3, ids, sigmas=[0.2], on="qk", replicates=2, progress=False)
    assert shielded.kl.max() < 1e-6 < 1e-2 < bare.kl.min()  # what is left is the norm's eps
    assert "a norm that follows removes it from q, k" in shielded.summary()
    assert "after that norm" in bare.summary()


def test_all_sigmas_share_their_draws_and_fewer_draws_are_the_first(gpt2: Any) -> None:
    whole = hooks.sweep(gpt2, ids, sigmas=[0.3, 0.02, 0.1], replicates=4, progress=False)
    some = hooks.sweep(gpt2, ids, sigmas=[0.1, 0.3], replicates=2, progress=False)
    assert whole.settings.sigmas == (0.02, 0.1, 0.3)
    for name in ("correct", "loss", "kl", "agree"):
        np.testing.assert_allclose(
            getattr(whole, name)[1:, :2], getattr(some, name), rtol=1e-9, atol=1e-10
        )
    # Draw by draw, a tiny step of sigma changes little; another draw changes more.
    near = hooks.sweep(gpt2, ids, sigmas=[0.1, 0.1001], replicates=2, progress=False).loss
    assert np.abs(near[1] - near[0]).max() < 0.1 * np.abs(near[0, 1] - near[0, 0]).min()


def test_the_halves_of_a_corpus_merge_into_the_whole(gpt2: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sigmas": SIGMAS, "replicates": 3, "progress": False}
    whole = hooks.sweep(gpt2, ids, **options)
    first = hooks.sweep(gpt2, ids[:1], **options)
    later = hooks.sweep(gpt2, ids[1:], first_prompt=1, **options)
    assert_close(first.merge(later), whole)
    again = SweepReport.load(whole.save(tmp_path / "deep" / "sweep.safetensors"))
    assert again.settings == whole.settings
    assert again.to_frame("draw").equals(whole.to_frame("draw"))
    assert str(again) == str(whole)
    with pytest.raises(ValueError, match="wanted a report that starts at prompt 1"):
        first.merge(whole)
    with pytest.raises(ValueError, match="equal settings"):
        first.merge(hooks.sweep(gpt2, ids[1:], first_prompt=1, seed=1, **options))
    other = tmp_path / "other"
    other.write_bytes(b"no report")
    with pytest.raises(ValueError, match="wanted a sweep report"):
        SweepReport.load(other)


# -- frames ---------------------------------------------------------------------------------


def a_report(correct: list[list[list[int]]], clean: list[int], positions: list[int]) -> SweepReport:
    """A report made by hand, [sigma, draw, prompt]."""
    right = np.array(correct)
    n = np.array(positions)
    return SweepReport(
        settings=hooks.SweepSettings(
            sigmas=tuple(0.1 * (i + 1) for i in range(len(right))),
            replicates=right.shape[1],
            on="q",
            law="uniform",
            shared="none",
            at="dot",
            rows="all",
            layers=(0,),
            seed=0,
        ),
        model={"name": "made", "sites": "", "shields": {}},
        first_prompt=0,
        tokens=((),) * len(n),
        decoder_tokens=(),
        positions=n,
        targets=n,
        clean_correct=np.array(clean),
        clean_loss=1.0 * n,
        correct=right,
        loss=2.0 * n + right,
        kl=0.5 * right,
        agree=right,
    )


@pytest.mark.usefixtures("unchecked")
def test_frames_pool_positions_and_their_errors_are_over_draws() -> None:
    report = a_report([[[4, 10], [6, 10]], [[2, 2], [0, 0]]], [8, 12], [10, 30])
    frame = report.to_frame()
    assert list(frame.sigma) == pytest.approx([0, 0.1, 0.2])
    assert list(frame.accuracy) == pytest.approx([20 / 40, 15 / 40, 2 / 40])
    assert list(frame.accuracy_change) == pytest.approx([0, -5 / 40, -18 / 40])
    spread = np.std([14 / 40, 16 / 40], ddof=1) / np.sqrt(2)
    assert frame.se_accuracy[1] == pytest.approx(spread)
    # Prompts: the linearised ratio, from its definition.
    change = np.array([5 - 8, 10 - 12])
    rest = change - change.sum() / 40 * np.array([10, 30])
    expected = np.sqrt(2 * (rest**2).sum()) / 40
    assert frame.se_prompts_accuracy_change[1] == pytest.approx(expected)
    prompts = report.to_frame("prompt")
    assert list(prompts[prompts["prompt"] == 1].accuracy) == pytest.approx([0.4, 1 / 3, 1 / 30])
    draws = report.to_frame("draw")
    assert list(draws.draw) == [-1, 0, 1, 0, 1]
    assert list(draws.accuracy) == pytest.approx([0.5, 14 / 40, 16 / 40, 4 / 40, 0])
    with pytest.raises(ValueError, match="by: wanted one of"):
        report.to_frame("head")  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_sigma_at_interpolates_and_refuses_what_is_not_bracketed() -> None:
    report = a_report([[[9]], [[6]], [[8]]], [10], [20])
    assert report.sigma_at(0.1) == pytest.approx(0.1)
    assert report.sigma_at(0.05) == pytest.approx(0.05)
    assert report.sigma_at(0.2) == pytest.approx(0.1 + 0.1 / 3)
    with pytest.raises(ValueError, match=r"at most 0\.4 \(sigmas up to 0\.3\); got 0\.5"):
        report.sigma_at(0.5)
    with pytest.raises(ValueError, match="a share between 0 and 1; got 1"):
        report.sigma_at(1)
    with pytest.raises(ValueError, match="a clean accuracy above 0"):
        a_report([[[0]]], [0], [20]).sigma_at()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("clean", "said"),
    [(39, "Too few answers are right to say where"), (40, "is lost at sigma = 0.1.")],
)
def test_a_tenth_of_few_right_answers_is_not_told(clean: int, said: str) -> None:
    summary = a_report([[[round(0.9 * clean)]]], [clean], [1000]).summary()
    assert said in summary
    assert ("A tenth of the accuracy is lost" in summary) is (clean >= 40)


# -- targets, padding, other models ---------------------------------------------------------


def test_targets_say_what_is_scored_and_are_cut_with_the_padding(gpt2: Any) -> None:
    targets = torch.full_like(ids, UNSCORED)
    targets[0, 3], targets[0, 9], targets[2, 5] = 7, 8, 9
    options: dict[str, Any] = {"sigmas": [0.2], "replicates": 1, "progress": False}
    report = hooks.sweep(gpt2, ids, targets=targets, **options)
    assert list(report.positions) == [2, 0, 1]
    for prompt in (0, 2):
        clean = logits(gpt2, ids[prompt : prompt + 1], None)
        noise = NormNoise(sigma=0.2)
        noisy = logits(gpt2, ids[prompt : prompt + 1], noise, first_prompt=prompt)
        expected = by_hand(clean, noisy, targets[prompt])
        np.testing.assert_allclose(noisy_sums(report, 0, 0, prompt), expected, rtol=1e-9)
    wide = [torch.nn.functional.pad(x, (2, 4), value=v) for x, v in ((ids, 0), (targets, UNSCORED))]
    mask = torch.nn.functional.pad(torch.ones_like(ids), (2, 4))
    assert_close(
        hooks.sweep(gpt2, wide[0], targets=wide[1], attention_mask=mask, **options), report
    )


def test_a_model_without_a_next_token_is_compared_with_itself(bert: Any) -> None:
    report = hooks.sweep(bert, ids, sigmas=[0.2], replicates=2, progress=False)
    frame = report.to_frame()
    assert frame[["accuracy", "loss"]].isna().all(axis=None)
    assert list(report.positions) == [17] * 3
    assert (frame.kl[1:] > 0).all()
    assert "No targets" in report.summary()
    masked = torch.full_like(ids, UNSCORED)
    masked[:, 4] = 3
    scored = hooks.sweep(bert, ids, targets=masked, sigmas=[0.2], replicates=2, progress=False)
    expected = by_hand(
        logits(bert, ids[1:2], None),
        logits(bert, ids[1:2], NormNoise(sigma=0.2, draw=1), first_prompt=1),
        masked[1],
    )
    np.testing.assert_allclose(noisy_sums(scored, 0, 1, 1), expected, rtol=1e-9)


def test_an_encoder_decoder_is_scored_at_its_decoder(t5: Any) -> None:
    decoder = models.tokens(3, 6, seed=4)
    report = hooks.sweep(
        t5, ids, decoder_tokens=decoder, sigmas=[0.2], replicates=2, batch_size=4, progress=False
    )
    assert list(report.positions) == [5] * 3
    given = {"decoder_input_ids": decoder[2:]}
    expected = by_hand(
        logits(t5, ids[2:], None, **given),
        logits(t5, ids[2:], NormNoise(sigma=0.2, draw=1), first_prompt=2, **given),
        shifted(decoder[2]),
    )
    np.testing.assert_allclose(noisy_sums(report, 0, 1, 2), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="at least one scored position; got none"):
        hooks.sweep(t5, ids, decoder_tokens=decoder[:, :1], progress=False)


def test_bfloat16_is_scored_in_float32() -> None:
    model = models.tiny_llama().to(torch.bfloat16)
    report = hooks.sweep(model, ids, sigmas=[0.2], replicates=1, batch_size=2, progress=False)
    for prompt, row in enumerate(ids):
        noise = NormNoise(sigma=0.2)
        both = [
            logits(model, row.repeat(2, 1), None)[:1],
            logits(model, row[None], noise, first_prompt=prompt),
        ]
        expected = by_hand(*both, shifted(row))[2]
        assert report.kl[0, 0, prompt] == pytest.approx(expected, rel=0.05)


# -- the model is left as it was found ------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_the_model_and_the_hooks_on_it_stay_as_they_were(gpt2: Any) -> None:
    seen: list[int] = []

    def user(tensor: Tensor, hook: Any) -> None:
        seen.append(len(tensor))

    gpt2.train()
    with gpt2.hooks(fwd_hooks=[("unembed.hook_in", user), ("blocks.0.hook_resid_pre", user)]):
        before = Found(gpt2)
        watched = hooks.sweep(gpt2, ids, sigmas=[0.2], replicates=2, layers=[2], progress=False)
        before.assert_same(Found(gpt2))
        with pytest.raises(ValueError, match="targets"):
            hooks.sweep(gpt2, ids, targets=torch.full_like(ids, UNSCORED), progress=False)
        before.assert_same(Found(gpt2))
    gpt2.eval()
    assert seen.count(9) == 2  # whole passes, clean and noisy rows in one: both hooks see them
    alone = hooks.sweep(gpt2, ids, sigmas=[0.2], replicates=2, layers=[2], progress=False)
    assert_close(watched, alone)


@pytest.mark.usefixtures("unchecked")
def test_a_failing_pass_leaves_nothing_behind(gpt2: Any) -> None:
    def fail(tensor: Tensor, hook: Any) -> None:
        if len(tensor) > 2:
            raise RuntimeError("mine")

    before = Found(gpt2)
    with (
        pytest.raises(ValueError, match=r"hooks: wanted .* got RuntimeError from yours .*mine"),
        gpt2.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]),
    ):
        hooks.sweep(gpt2, ids, sigmas=[0.2], replicates=3, progress=False)
    before.assert_same(Found(gpt2))


def test_clean_layers_run_once_and_only_scored_positions_are_unembedded(gpt2: Any) -> None:
    rows: dict[str, list[int]] = {"first": [], "last": [], "logits": []}

    def note(name: str) -> Any:
        return lambda module, args, out: rows[name].append(
            (out[0] if isinstance(out, tuple) else out)[..., 0].numel()
        )

    inner = gpt2.original_model
    handles = [
        inner.transformer.h[0].register_forward_hook(note("first")),
        inner.transformer.h[2].register_forward_hook(note("last")),
        inner.lm_head.register_forward_hook(note("logits")),
    ]
    targets = torch.full_like(ids, UNSCORED)
    targets[:, -1] = 3
    try:
        hooks.sweep(
            gpt2,
            ids,
            targets=targets,
            sigmas=SIGMAS,
            replicates=20,
            layers=[2],
            batch_size=50,
            progress=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    assert rows["first"][-3:] == [17] * 3  # one row for each prompt
    assert rows["last"][-3:] == [17 * 41] * 3
    assert rows["logits"][-3:] == [41] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": []}, "one or more above 0"),
        ({"sigmas": [0.1, 0.1]}, "each once"),
        ({"sigmas": [0.6]}, "wanted <"),
        ({"replicates": 0}, "replicates: wanted an integer >= 1; got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"layers": [9]}, "layers: wanted one of"),
        ({"rows": "sparse"}, "wanted on='q', 'k' or 'qk'"),
        ({"targets": ids[:, 1:]}, "wanted 17 integer ids"),
        ({"targets": ids[:2]}, "one row for each of 3 prompts"),
        ({"targets": ids + models.VOCAB}, "wanted ids from 0 to 96"),
    ],
)
def test_bad_input_is_refused_in_words(gpt2: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hooks.sweep(gpt2, ids, progress=False, **options)


def test_one_prompts_own_targets_may_be_one_row(gpt2: Any) -> None:
    """Ids, mask and targets ``[pos]``, as tensors or lists, padded or not."""
    options = {"sigmas": [0.2], "replicates": 2, "progress": False}
    targets = torch.full_like(ids[0], UNSCORED)
    targets[3], targets[9] = 7, 8
    whole = hooks.sweep(gpt2, ids[:1], targets=targets[None], **options).to_frame()
    pad = torch.nn.functional.pad
    mask = pad(torch.ones_like(ids[0]), (2, 4))
    wide = (pad(ids[0], (2, 4)), pad(targets, (2, 4), value=UNSCORED))
    for tokens, wanted, how in (
        (ids[0], targets, {}),
        (ids[0].tolist(), targets.tolist(), {}),
        (wide[0], wide[1], {"attention_mask": mask}),
        (wide[0], wide[1].tolist(), {"attention_mask": mask}),
    ):
        again = hooks.sweep(gpt2, tokens, targets=wanted, **how, **options).to_frame()
        pd.testing.assert_frame_equal(again, whole)
    with pytest.raises(ValueError, match=r"targets: prompt 0: wanted .*padding incl"):
        hooks.sweep(gpt2, wide[0], targets=targets, attention_mask=mask, **options)
