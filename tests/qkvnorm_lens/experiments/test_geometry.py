"""The experiments spread, sparsity and quantisation, and the cache formats behind the last."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

import hooks
from hooks import UnsupportedModelError
from hooks.model.encoding import encode
from hooks.sites.watch import observe
from qkvnorm_lens.experiments.beyond.quantisation import (
    EXPERIMENT as QUANTISATION,
    measure as quantisation,
    words as quantisation_words,
)
from qkvnorm_lens.experiments.beyond.quantisation.errors import (
    CacheErrors,
    cache_hooks,
    direction_error,
    largest_magnitudes,
    output_effect,
    relative_norm,
)
from qkvnorm_lens.experiments.beyond.quantisation.schemes import SCHEMES, Scheme, q4_0, symmetric
from qkvnorm_lens.experiments.core import running
from qkvnorm_lens.experiments.core.base import Subject
from qkvnorm_lens.experiments.core.read import UNSCORED, Amount, Reading, reading
from qkvnorm_lens.experiments.core.subjects import find_subjects
from qkvnorm_lens.experiments.paper.sparsity import (
    EXPERIMENT as SPARSITY,
    measure as sparsity,
    words as sparsity_words,
)
from qkvnorm_lens.experiments.paper.spread import (
    EXPERIMENT as SPREAD,
    measure as spread,
    words as spread_words,
)
from tests.support import models
from tests.support.watching import tiny_gemma2

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
MEASURES = {"spread": spread, "sparsity": sparsity, "quantisation": quantisation}
EXPERIMENTS = {e.name: e for e in (SPREAD, SPARSITY, QUANTISATION)}
KINDS = {**models.TINY, "gemma2": tiny_gemma2}
ids = models.tokens(3, 17).tolist()


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- cache formats ------------------------------------------------------------------------------


def test_int8_of_known_values() -> None:
    x = torch.tensor([127.0, -63.6, 1.4, 0.5]).reshape(1, 1, 1, 4)
    back = BY_NAME["int8"].on_k(x, 127.0)
    assert back.flatten().tolist() == [127, -64, 1, 0]  # a half goes to the even integer
    assert BY_NAME["int8"].on_k(2 * x, 0.0).flatten().tolist() == [254, -128, 2, 0]


def integers(low: int, high: int, ends: tuple[int, ...], axis: int) -> Tensor:
    """Integers of a range, its ends among each group of 32 along an axis: ``[2, 64, 2, 64]``."""
    x = torch.randint(low, high + 1, (2, 64, 2, 64), generator=torch.Generator().manual_seed(1))
    for i, end in enumerate(ends):
        x.index_fill_(axis, torch.tensor([3 + i, 35 + i]), end)
    return x.float()


REPRESENTABLE = {
    "int8": integers(-127, 127, (127,), -1),
    "int4": integers(-7, 7, (-7,), -1),
    "int4 q4_0": integers(-8, 7, (-8,), -1),
}


@pytest.mark.parametrize("name", REPRESENTABLE)
@pytest.mark.parametrize("unit", [0.25, 8.0])
def test_what_a_format_holds_comes_back(name: str, unit: float) -> None:
    x = unit * REPRESENTABLE[name]
    assert torch.equal(BY_NAME[name].on_k(x, 0.0), x)
    assert torch.equal(BY_NAME[name].on_v(x, 0.0), x)


def test_kivi_holds_sixteen_levels_per_channel_for_keys_and_per_token_for_values() -> None:
    scheme = BY_NAME["int4 KIVI"]
    by_channel = 0.5 * integers(0, 15, (0, 15), 1) - 3
    by_token = 0.5 * integers(0, 15, (0, 15), -1) - 3
    assert torch.equal(scheme.on_k(by_channel, 0.0), by_channel)
    assert torch.equal(scheme.on_v(by_token, 0.0), by_token)
    # An outlier spoils its own channel for the keys, and its own token for the values.
    for quantise, axis in ((scheme.on_k, 3), (scheme.on_v, 1)):
        x = vectors(1, 32, 1, 32)
        x[0, 5, 0, 7] = 1000.0
        error = (quantise(x, 0.0) - x).abs().amax((0, 2))
        hit = error.select(1 if axis == 3 else 0, 7 if axis == 3 else 5)
        rest = error.sum() - hit.sum()
        assert hit.max() > 1
        assert (error > 0.3).sum() == (hit > 0.3).sum()
        assert rest > 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8 e4m3", torch.float8_e4m3fn), ("fp8 e5m2", torch.float8_e5m2)],
)
def test_fp8_is_the_nearest_of_all_its_numbers(name: str, dtype: torch.dtype) -> None:
    """Held against the list of all 256 codes, and they come back as they are."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].unique()
    top = float(codes.max())
    x = torch.cat([codes, 40 * vectors(4000), 0.01 * vectors(1000)]).clamp(-top, top)
    back = BY_NAME[name].on_k(x.reshape(1, -1, 1, 1), top).flatten()
    assert torch.equal(back[: len(codes)], codes)
    nearest = (x[:, None] - codes).abs().amin(1)
    torch.testing.assert_close((back - x).abs(), nearest, atol=0, rtol=1e-6)
    assert torch.equal(back, x.to(dtype).float())
    scaled = BY_NAME[name].on_v(x.reshape(1, -1, 1, 1) / 4, top / 4).flatten()
    assert torch.equal(scaled, back / 4)


def test_q4_0_is_llama_cpps_reference() -> None:
    """``quantize_row_q4_0_ref`` and its inverse, number by number."""

    def reference(block: np.ndarray) -> list[float]:
        extreme = np.float32(0)
        for value in block:
            if abs(value) > abs(extreme):
                extreme = value
        d = extreme / np.float32(-8)
        inverse = np.float32(1) / d if d else np.float32(0)
        q = [min(15, int(np.float32(value * inverse) + np.float32(8.5))) for value in block]
        return [(i - 8) * float(np.float16(d)) for i in q]

    x = torch.cat([vectors(2, 5, 2, 64), torch.zeros(2, 1, 2, 64)], 1)
    wanted = [reference(block) for block in x.reshape(-1, 32).numpy()]
    torch.testing.assert_close(q4_0(x).reshape(-1, 32), torch.tensor(wanted), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("d_head", [16, 64, 80])
def test_formats_know_no_sign_of_zero_and_are_close(name: str, d_head: int) -> None:
    scheme = BY_NAME[name]
    x = vectors(2, 40, 2, d_head, seed=4)
    x[0, 3, 1] = 0
    largest = float(x.abs().max())
    if not scheme.fits([d_head]):
        with pytest.raises(ValueError, match=f"d_head: wanted a multiple of 32, .*; got {d_head}"):
            scheme.on_v(x, largest)
        return
    for quantise in (scheme.on_k, scheme.on_v):
        back = quantise(x, largest)
        assert back.shape == x.shape
        assert back.dtype == x.dtype
        error = (back - x).norm() / x.norm()
        assert 0 < error < (0.2 if "4 " in name or name == "int4" else 0.06)
    assert torch.equal(BY_NAME["int8"].on_k(x, 0.0)[0, 3, 1], torch.zeros(d_head))


@pytest.mark.parametrize("d_head", [20, 72, 80, 16, 8, 48, 100])
def test_formats_in_groups_exist_only_for_heads_that_groups_divide(d_head: int) -> None:
    """gguf has no q4_0 of such a width, and KIVI's groups of 32 channels end within a head."""
    x = vectors(1, 40, 2, d_head)
    with pytest.raises(ValueError, match=f"d_head: wanted a multiple of 32, .*q4_0; got {d_head}"):
        q4_0(x)
    kivi = BY_NAME["int4 KIVI"]
    with pytest.raises(ValueError, match=f"d_head: wanted a multiple of 32, .*; got {d_head}"):
        kivi.on_v(x, 0.0)
    fit = {s.name for s in SCHEMES if s.fits([d_head])}
    assert fit == {*BY_NAME} - {"int4 KIVI", "int4 q4_0"}
    assert {s.name for s in SCHEMES if s.fits([32, 64, 96, 128])} == {*BY_NAME}
    assert not BY_NAME["int4 q4_0"].fits([64, d_head])


@given(st.floats(0.01, 100), st.integers(0, 50))
def test_an_integers_error_is_at_most_half_a_step(unit: float, seed: int) -> None:
    x = unit * vectors(1, 3, 2, 16, seed=seed)
    for name, top in (("int8", 127), ("int4", 7)):
        step = x.abs().amax(-1, keepdim=True) / top
        assert bool(((BY_NAME[name].on_k(x, 0.0) - x).abs() <= 0.5001 * step).all())


def test_a_static_scale_wants_a_magnitude() -> None:
    for largest in (0.0, float("nan")):
        with pytest.raises(ValueError, match="largest: wanted a magnitude above 0"):
            BY_NAME["fp8 e4m3"].on_k(vectors(1, 2, 1, 4), largest)


# -- errors of vectors -------------------------------------------------------------------------


@given(st.floats(0.0, 3.0), st.floats(0.0, 3.14), st.integers(0, 30))
def test_length_and_angle_of_a_turned_vector(length: float, angle: float, seed: int) -> None:
    u, w = torch.linalg.qr(vectors(8, 2, seed=seed).double())[0].T
    back = length * (np.cos(angle) * u + np.sin(angle) * w)
    assert float(relative_norm(5 * u, 5 * back)) == pytest.approx(length, abs=1e-9)
    wanted = 1 - np.cos(angle) if length > 0 else 1.0
    if length == 0 or length > 1e-6:
        assert float(direction_error(5 * u, 5 * back)) == pytest.approx(wanted, abs=1e-9)


def test_a_small_angle_does_not_drown_in_rounding() -> None:
    x = torch.tensor([1.0, 0.0])
    y = torch.tensor([1.0, 1e-5])
    assert float(direction_error(x, y)) == pytest.approx(5e-11, rel=1e-4)


# -- rows ---------------------------------------------------------------------------------------


def of_both(name: str, change: Any) -> Scheme:
    return Scheme(name, "", lambda x, _: change(x), lambda x, _: change(x))


def measured(model: Any, *schemes: Scheme, prompts: Any = ids) -> CacheErrors:
    layers, read = hooks.attention_sites(model).layers, encode(model, prompts)
    errors = CacheErrors(layers, schemes, largest_magnitudes(model, layers, read, 8))
    observe(model, layers, read, errors.add, vectors=("q", "k", "v"))
    return errors


def total(errors: CacheErrors, name: str, effect: str) -> int:
    return sum(int(errors.moved[name, i, effect].sum()) for i in range(len(errors.rows)))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma2"])
def test_one_error_of_all_lengths_moves_nothing(kind: str) -> None:
    """Every key shorter by a fifth, in a layer without a bias: no arg max can tell."""
    errors = measured(KINDS[kind](), of_both("shorter", lambda x: 0.8 * x))
    assert sum(int(n.sum()) for n in errors.rows) > 100
    for effect in ("moved_norm", "moved_direction", "moved"):
        assert total(errors, "shorter", effect) == 0
    for role in ("k", "v"):
        got = errors.errors["shorter", 0, role].measures(role, 0)  # type: ignore[arg-type,index]
        assert got[f"norm_{role}"] == pytest.approx(0.2, rel=1e-5)
        assert got[f"norm_mean_{role}"] == pytest.approx(-0.2, rel=1e-5)
        assert got[f"norm_largest_{role}"] == pytest.approx(0.2, rel=1e-5)
        assert got[f"direction_{role}"] == pytest.approx(0, abs=1e-12)


def test_a_cache_without_error_does_nothing(model: Any) -> None:
    same = of_both("same", lambda x: x)
    errors = measured(model, same)
    assert all(total(errors, "same", effect) == 0 for effect in ("moved_norm", "moved", "strict"))
    layers, read = hooks.attention_sites(model).layers, encode(model, ids)
    targets = [[*row[1:], UNSCORED] for row in ids]
    largest = measured(model).largest
    (row,) = output_effect(model, layers, read, targets, [same], largest, 2, apart=False)
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["loss"] == pytest.approx(row["loss_clean"], abs=1e-6)
    assert row["agreement"] == 1
    assert row["positions"] == 3 * 16


def test_turned_keys_keep_their_lengths(model: Any) -> None:
    """A cache that turns every key round: all of the effect is direction, none is norm."""
    errors = measured(model, of_both("turned", lambda x: -x))
    assert total(errors, "turned", "moved_norm") == 0
    assert total(errors, "turned", "moved") == total(errors, "turned", "moved_direction") > 50
    assert errors.errors["turned", 1, "k"].measures("k", 1)["direction_k"] == pytest.approx(2)


def uneven(x: Tensor) -> Tensor:
    """Lengths off by up to a half, without a change of direction."""
    return x * (1 + 0.5 * torch.sin(37 * x.sum(-1, keepdim=True)))


COARSE = {
    "int2": of_both("int2", partial(symmetric, top=1)),
    "uneven": of_both("uneven", uneven),
}


@pytest.mark.parametrize("name", ["fp8 e4m3", "int4", *COARSE])
def test_rows_move_where_the_model_itself_moves_them(model: Any, name: str) -> None:
    """One layer's keys put through the cache in the model: its own pattern shows the rows."""
    scheme = (BY_NAME | COARSE)[name]
    errors = measured(model, scheme)
    layers = hooks.attention_sites(model).layers
    prompts = torch.tensor(ids)
    kinds = [np.zeros((4, 2), dtype=int) for _ in range(3)]
    for i, sites in enumerate(layers):
        seen: list[Tensor] = []
        watch = (sites.pattern, lambda pattern, hook, seen=seen: seen.append(pattern))
        (at_k,) = cache_hooks([sites], scheme, ("k",), {(0, "k"): errors.largest[i, "k"]})
        with torch.no_grad():
            model.run_with_hooks(prompts, fwd_hooks=[watch])
            model.run_with_hooks(prompts, fwd_hooks=[at_k, watch])
        clean, moved = seen
        sparse = (clean.amax(-1) >= hooks.SPARSE) & (torch.arange(17) > 0)
        shifted = sparse & (clean.argmax(-1) != moved.argmax(-1))
        strict = shifted & (moved.amax(-1) >= hooks.SPARSE)
        for found, rows in zip(kinds, (sparse, shifted, strict), strict=True):
            sink = clean.argmax(-1) == 0
            found += torch.stack([(rows & ~sink).sum((0, 2)), (rows & sink).sum((0, 2))], 1).numpy()
    counted = [
        sum(errors.rows),
        *(sum(errors.moved[name, i, e] for i in range(len(layers))) for e in ("moved", "strict")),
    ]
    for found, got in zip(kinds, counted, strict=True):
        assert np.array_equal(found, got)
    if name in COARSE:
        assert kinds[1].sum() > 0


def test_only_rows_below_the_largest_error_can_move(model: Any) -> None:
    """The certificate: critical half-widths bound what the norm error of any format moves."""
    layers = hooks.attention_sites(model).layers
    schemes = (*(s for s in SCHEMES if s.fits([8])), *COARSE.values())
    errors = measured(model, *schemes)
    probe = hooks.collapse_probe(model, ids, on="k", sigmas=[0.1], draws=0, progress=False)
    some = 0
    for scheme in schemes:
        for i, sites in enumerate(layers):
            for head in range(sites.n_heads):
                for kind in (0, 1):
                    at = (errors, probe, scheme.name, i, head, sites.kv_head_of[head], kind)
                    got = quantisation.of_head(*at)
                    assert got["moved_norm"] <= got["able"] <= got["rows"]
                    assert got["rows"] == probe.rows[i, head, :, kind].sum()
                    some += int(got["moved_norm"])
    assert some > 0


def test_the_prediction_is_the_probes_own_rate(model: Any) -> None:
    """Expected rows at sigma = RMS norm error, against a probe at that very sigma."""
    errors = measured(model, BY_NAME["int4"])
    probe = hooks.collapse_probe(model, ids, on="k", sigmas=[0.1], draws=0, progress=False)
    sites = hooks.attention_sites(model).layers[1]
    for head in range(4):
        at = ("int4", 1, head, sites.kv_head_of[head])
        got = [quantisation.of_head(errors, probe, *at, kind) for kind in (0, 1)]
        sigma = got[0]["norm_k"]
        own = hooks.collapse_probe(model, ids, on="k", sigmas=[sigma], draws=0, progress=False)
        frame = own.to_frame("head").set_index("label").loc[f"{sites.label}H{head}"]
        expected = sum(part["predicted"] for part in got)
        assert expected == pytest.approx(frame["loose"] * frame["rows"], abs=1e-6)


def test_scores_that_are_not_the_models_are_refused() -> None:
    """A hook behind ours changes the keys: what is recomputed from them is something else."""
    bridge = models.tiny_gpt2()
    layers, read = hooks.attention_sites(bridge).layers, encode(bridge, ids)
    schemes = [s for s in SCHEMES if s.fits([8])]
    errors = CacheErrors(layers, schemes, largest_magnitudes(bridge, layers, read, 8))

    def spoil(scores: Tensor, hook: Any) -> Tensor:
        return scores + torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))

    spoiled = [("blocks.0.attn.hook_attn_scores", spoil)]
    with pytest.raises(UnsupportedModelError, match="layer 0: scores from q and k"):
        observe(bridge, layers, read, errors.add, vectors=("q", "k", "v"), hooks=spoiled)


def test_the_outputs_loss_is_that_of_a_plain_pass(model: Any) -> None:
    scheme = BY_NAME["int4"]
    layers, read = hooks.attention_sites(model).layers, encode(model, ids)
    largest = largest_magnitudes(model, layers, read, 8)
    targets = [[*row[1:], UNSCORED] for row in ids]
    rows = output_effect(model, layers, read, targets, [scheme], largest, 2)
    assert [row["quantised"] for row in rows] == ["kv", "k", "v"]
    answers = torch.tensor(ids)[:, 1:, None]
    for row in rows:
        with torch.no_grad():
            clean = model(torch.tensor(ids))[:, :-1].double().log_softmax(-1)
            entries = cache_hooks(layers, scheme, tuple(row["quantised"]), largest)
            back = model.run_with_hooks(torch.tensor(ids), fwd_hooks=entries)[:, :-1].double()
        back = back.log_softmax(-1)
        assert row["loss_clean"] == pytest.approx(-float(clean.gather(2, answers).mean()), rel=1e-4)
        assert row["loss"] == pytest.approx(-float(back.gather(2, answers).mean()), rel=1e-4)
        kl = (clean.exp() * (clean - back)).sum(-1).mean()
        assert row["kl"] == pytest.approx(float(kl), rel=1e-3)
        assert row["kl"] > 1e-4
        agree = (clean.argmax(-1) == back.argmax(-1)).double().mean()
        assert row["agreement"] == pytest.approx(float(agree))


# -- row maxima -----------------------------------------------------------------------------------


def nobody(name: str = "tiny", group: str = "tiny") -> Subject:
    return Subject(name, "language", None, "", group, None, "0")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the experiments look at a model of the tests."""

    def install(model: Any, prompts: list[list[int]] = ids) -> None:
        read = Reading(prompts, [[*row[1:], UNSCORED] for row in prompts])
        monkeypatch.setattr(Subject, "load", lambda self: model)
        for module in MEASURES.values():
            monkeypatch.setattr(module, "reading", lambda subject, amount: read)

    return install


def test_maxima_are_those_of_the_patterns(model: Any, reads: Any) -> None:
    reads(model)
    table = sparsity.measure(nobody(), sparsity.AMOUNT["smoke"], maps=2)
    heads, bins = (table[table["what"] == what] for what in ("head", "histogram"))
    _, cache = model.run_with_cache(torch.tensor(ids))
    counts = np.zeros((2, sparsity.BINS))
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, 1:].double().numpy()
        best, sink = pattern.max(-1), pattern.argmax(-1) == 0
        for head in range(4):
            for kind, of_kind in (("content", ~sink), ("sink", sink)):
                mine = best[:, head][of_kind[:, head]]
                at = (heads["layer"] == layer) & (heads["head"] == head) & (heads["kind"] == kind)
                (row,) = heads[at].itertuples()
                assert row.rows == mine.size
                assert row.sparse == (mine >= 0.95).sum()
                assert row.non_sparse == (mine < 0.70).sum()
                counts[int(kind == "sink")] += np.histogram(mine, sparsity.BINS, (0, 1))[0]
    for i, kind in enumerate(sparsity.KINDS):
        got = bins[bins["kind"] == kind]["rows"].to_numpy()
        assert got.sum() == counts[i].sum()
        assert np.abs(got - counts[i]).sum() <= 2  # a maximum on an edge of a bin may round
    share = sparsity_words.shares(table).iloc[0]
    assert share["sparse"] == pytest.approx(heads["sparse"].sum() / (8 * 3 * 16))
    assert share["sinks"] == pytest.approx(counts[1].sum() / counts.sum())


def test_maps_are_patterns_of_the_heads_with_most_sparse_rows(reads: Any) -> None:
    bridge = models.tiny_llama()
    reads(bridge)
    table = sparsity.measure(nobody(), sparsity.AMOUNT["smoke"], maps=2)
    cells, heads = (table[table["what"] == what] for what in ("map", "head"))
    content = heads[heads["kind"] == "content"].set_index("label")["sparse"]
    _, cache = bridge.run_with_cache(torch.tensor(ids[:1]))
    shown = list(dict.fromkeys(cells.sort_values("rank")["label"]))
    assert len(shown) == 2
    assert [content[name] for name in shown] == sorted(content, reverse=True)[:2]
    for _, mine in cells.groupby("label"):
        layer, head = int(mine["layer"].iloc[0]), int(mine["head"].iloc[0])
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
        query, key = (torch.tensor(mine[n].astype(int).to_numpy()) for n in ("query", "key"))
        np.testing.assert_allclose(mine["weight"], pattern[query, key], atol=6e-5)
        assert len(mine) == 17 * 18 // 2
        assert [eval(t) for t in mine["key_token"]] == [str(ids[0][i]) for i in key]


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_peak_is_a_ratio_of_densities(top: int, beside: int) -> None:
    low = np.arange(sparsity.BINS) / sparsity.BINS
    rows = np.where(low >= 0.98, top, np.where(low >= 0.80, beside, 77))
    bins = pd.DataFrame({"low": low, "rows": rows})
    assert sparsity_words.peak_of(bins) == pytest.approx(top / beside)
    assert sparsity_words.peak_of(bins.sample(frac=1, random_state=0)) == pytest.approx(
        top / beside
    )


# -- the experiments as such --------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MEASURES.values():
        monkeypatch.setitem(module.AMOUNT, "smoke", Amount(sums=12, windows=1))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_part_reads_as_much_as_the_experiment_says(name: str) -> None:
    amount = MEASURES[name].AMOUNT["full"]
    (part,) = EXPERIMENTS[name].parts(find_subjects(["addition-pre"]), "full")
    assert part.settings["sums"] == amount.sums
    assert amount in part.work.args  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_run_on_shipped_models_is_read_back_and_says_the_same(name: str, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    subjects = find_subjects(["addition-pre", "addition-qkv"])
    outcome = running.run_experiment(experiment, subjects, tmp_path, size="smoke", progress=False)
    assert list(outcome.table.columns[:4]) == ["model", "group", "placement", "seed"]
    assert set(outcome.table["model"]) == {"addition-pre", "addition-qkv"}
    back = running.read_table(outcome.folder)
    assert experiment.text(back) == outcome.text
    assert experiment.claims(back) == experiment.claims(outcome.table)
    assert "addition-qkv" in outcome.text
    assert "nan" not in outcome.text
    assert (outcome.folder / "figure.png").stat().st_size > 20_000
    experiment.figure(back)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_language_model_has_no_placement_and_is_shown_too(
    name: str, tmp_path: Path, reads: Any
) -> None:
    experiment = EXPERIMENTS[name]
    reads(models.tiny_qwen3())
    outcome = running.run_experiment(experiment, [nobody()], tmp_path, size="smoke", progress=False)
    back = running.read_table(outcome.folder)
    assert experiment.text(back) == outcome.text
    assert "tiny" in outcome.text
    assert [c for c in experiment.claims(back) if c.same != "-"] == []  # nothing published of these
    experiment.figure(back)


@pytest.mark.slow
@pytest.mark.usefixtures("little")
def test_parts_are_the_same_again() -> None:
    (subject,) = find_subjects(["addition-none"])
    for experiment in EXPERIMENTS.values():
        (part,) = experiment.parts((subject,), "smoke")
        pd.testing.assert_frame_equal(part.work(), part.work(), check_exact=True)


def test_the_first_model_of_a_group_shows_maps() -> None:
    subjects = (nobody("a", "one"), nobody("b", "one"), nobody("c", "two"))
    got = [part.settings["maps"] for part in sparsity.parts(subjects, "quick")]
    assert got == [sparsity.MAP_HEADS, 0, sparsity.MAP_HEADS]


@pytest.fixture(scope="module")
def one_model() -> pd.DataFrame:
    (subject,) = find_subjects(["addition-pre"])
    return spread.measure(subject, Amount(sums=8, windows=1))


def seeds(table: pd.DataFrame, column: str, of: dict[str, list[float]]) -> pd.DataFrame:
    """One model's rows made into study models of several seeds, one number of theirs changed."""
    frames = []
    for placement, values in of.items():
        for seed, value in enumerate(values, 1):
            frames.append(
                table.assign(
                    model=f"study-{placement}-{seed}",
                    group=f"study-{placement}",
                    placement=placement,
                    seed=seed,
                    **{column: value},
                )
            )
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize(
    ("pre", "qkv", "verdict"),
    [
        ([0.19, 0.20, 0.21], [0.48, 0.5, 0.52], "yes"),
        ([0.48, 0.5, 0.52], [0.19, 0.2, 0.21], "no"),
        ([0.1, 0.2, 0.3], [0.15, 0.2, 0.31], "not decided"),
    ],
)
def test_whether_qkv_norm_is_wider_is_decided_over_seeds(
    one_model: pd.DataFrame, pre: list[float], qkv: list[float], verdict: str
) -> None:
    table = seeds(one_model, "band", {"pre": pre, "qkv": qkv})
    (claim,) = [c for c in spread_words.claims(table) if "against" in c.what]
    assert claim.same == verdict
    assert "3 seeds each" in claim.ours
    text = spread_words.text(table)
    said = {"yes": "QKV-Norm is wider;", "no": "narrower;", "not decided": "not decided;"}
    assert said[verdict] in text


def test_heads_that_stand_a_format_are_named() -> None:
    own = pd.DataFrame(
        {
            "label": ["L0H0", "L0H1", "L1H0"],
            "rows": [100, 100, 100],
            "moved_share": [0.0, 0.041, 0.01],
        }
    )
    assert quantisation_words.which_stand(own) == "2 of 3; not L0H1 (4.1%)"
    assert quantisation_words.which_stand(own.iloc[[0, 2]]) == "2 of 2"
    assert quantisation_words.which_stand(own.iloc[:0]) == "no head with enough sparse rows"


def test_sums_are_read_with_their_answers() -> None:
    from qkvnorm_lens.training.addition import VOCAB

    (subject,) = find_subjects(["addition-pre"])
    read = reading(subject, Amount(sums=20, windows=1))
    for row, wanted in zip(read.ids, read.targets, strict=True):
        line = "".join(VOCAB[i] for i in row)
        question, answer = line.split("=")
        scored = [t for t in wanted if t != UNSCORED]
        assert "".join(VOCAB[t] for t in scored) == answer + "]"
        total = question[1:].replace("+", " + ").replace("-", " - ").replace("N", "-")
        assert eval(total) == int(answer.replace("N", "-"))
