"""Random Markov networks, and the experiments spectrum and centring."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from qkvnorm_lens.experiments import train
from qkvnorm_lens.experiments.core import running, studies
from qkvnorm_lens.experiments.core.grouped import PLAIN, pick
from qkvnorm_lens.experiments.core.subjects import find_subjects
from qkvnorm_lens.experiments.related.centring import (
    EXPERIMENT as CENTRING,
    measure as centring,
    words as centring_words,
)
from qkvnorm_lens.experiments.related.spectrum import (
    EXPERIMENT as SPECTRUM,
    measure as spectrum,
    words,
    words as spectrum_words,
)
from qkvnorm_lens.theory.markov import (
    VARIANCE,
    Recursion,
    gradient_norms,
    propagate,
    random_markov,
    random_softmax,
    stable_rank,
    uniform,
)
from tests.support.watching import shape_checks_off

EYE = torch.eye(3, dtype=torch.float64)
SEEDS = st.integers(0, 2**20)
ALL = [
    Recursion(attention=a, causal=c, centred=f, norm=n, skip=s)  # type: ignore[arg-type]
    for a in ("markov", "softmax")
    for c in (False, True)
    for f in (False, True)
    for n in (False, True)
    for s in (False, True)
]


def svd(matrix: Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.detach().numpy(), compute_uv=False)


def rotation(n: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=rng).double())[0]


# -- random matrices ----------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(1, 40), causal=st.booleans())
def test_random_attention_is_row_stochastic(seed: int, n: int, causal: bool) -> None:
    x = rotation(n, seed) * math.sqrt(n)
    for a in (
        random_markov(n, seed=seed, causal=causal),
        random_softmax(x, seed=seed, causal=causal),
        uniform(n, causal=causal),
    ):
        assert a.dtype == torch.float64
        assert (a >= 0).all()
        torch.testing.assert_close(a.sum(1), torch.ones(n).double())
        assert torch.equal(a.triu(1), torch.zeros(n, n).double()) or not causal
        assert svd(a)[0] >= 1 - 1e-12  # A 1 = 1


def test_entries_have_mean_and_variance_one_before_they_are_normed() -> None:
    """exp of N(-ln2/2, ln2)."""
    assert math.exp(-VARIANCE / 2 + VARIANCE / 2) == 1
    assert math.exp(VARIANCE) - 1 == pytest.approx(1)
    a = random_markov(400, seed=0)
    # Behind the norm: mean 1/T, variance near 1/T^2, so that |A - U|_F^2 is near 1.
    assert float((a - uniform(400)).square().sum()) == pytest.approx(1, abs=0.06)


def test_the_gap_of_random_markov_matrices() -> None:
    """Top near 1; the bulk's edge near 2/sqrt(T); s_2 within a tenth of it at T = 400."""
    values = np.stack([svd(random_markov(400, seed=seed)) for seed in range(3)])
    np.testing.assert_allclose(values[:, 0], 1, atol=0.005)
    np.testing.assert_allclose(values[:, 1], 2 / 20, rtol=0.1)
    # Quarter circle of radius 2/sqrt(T): mean of s is 8/(3 pi) times half of the radius.
    np.testing.assert_allclose(values[:, 1:].mean(1), 8 / (3 * math.pi) / 20, rtol=0.02)


def test_the_uniform_matrices() -> None:
    whole = svd(uniform(30))
    assert whole[0] == pytest.approx(1)
    assert (whole[1:] < 1e-12).all()
    masked = svd(uniform(30, causal=True))
    assert masked[0] == pytest.approx(1.53, abs=0.005)
    assert masked[1] == pytest.approx(0.91, abs=0.005)


def test_softmax_of_orthogonal_tokens_has_the_scores_variance_of_the_markov_matrix() -> None:
    """Also for narrow heads; ln of the entries is the scores up to a constant in each row."""
    x = math.sqrt(300) * rotation(300, 0)
    for d_head in (300, 64):
        scores = random_softmax(x, seed=1, d_head=d_head).log()
        scores = scores - scores.mean(1, keepdim=True)
        assert float(scores.var()) == pytest.approx(VARIANCE, rel=0.1)
        # softmax keeps scores up to their rows' means: rank d_head, less or more one
        rank = int((torch.linalg.svdvals(scores) > 1e-9).sum())
        assert rank <= d_head + 1


# -- stable rank --------------------------------------------------------------------------------


@given(seed=SEEDS, n=st.integers(1, 12), d=st.integers(1, 12))
def test_stable_rank_is_that_of_the_gram_matrix(seed: int, n: int, d: int) -> None:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double()
    gram = (x @ x.T).numpy()
    wanted = np.linalg.norm(gram) ** 2 / np.linalg.norm(gram, 2) ** 2
    got = stable_rank(x)
    assert got == pytest.approx(wanted, rel=1e-6)
    assert 1 - 1e-9 <= got <= min(n, d) + 1e-9
    assert stable_rank(3 * x @ rotation(d, seed)) == pytest.approx(got, rel=1e-9)


def test_stable_rank_of_equal_and_of_orthogonal_tokens() -> None:
    assert stable_rank(torch.ones(7, 9).double()) == pytest.approx(1)
    assert stable_rank(rotation(7, 0)) == pytest.approx(7)
    with pytest.raises(ValueError, match="wanted finite numbers that are not all zero"):
        stable_rank(torch.zeros(3, 3).double())


# -- recursions ---------------------------------------------------------------------------------


def test_states_are_the_recursion_by_hand() -> None:
    made = propagate(Recursion(), 6, 2, seed=5, width=8)
    x0, x1, x2 = (x.detach() for x in made.states)
    torch.testing.assert_close(x0 @ x0.T, 8 * torch.eye(6).double())
    # One layer's attention is found from what it did: A = X_1 (X_0 W)^+ for T <= d.
    a = x1 @ torch.linalg.pinv(x0 @ made.weights[0].detach())
    torch.testing.assert_close(a.sum(1), torch.ones(6).double(), atol=1e-6, rtol=1e-6)
    fixed = propagate(Recursion(centred=True), 6, 2, seed=5, width=8).states[1].detach()
    u = torch.full((6, 6), 1 / 6).double()
    torch.testing.assert_close(fixed, (a - u) @ x0 @ made.weights[0].detach())
    skip = propagate(Recursion(skip=True), 6, 2, seed=5, width=8).states[1].detach()
    torch.testing.assert_close(skip, x0 + x1)
    scaled = propagate(Recursion(gain=3.0), 6, 2, seed=5, width=8).states[2].detach()
    torch.testing.assert_close(scaled, 9 * x2)


@pytest.mark.parametrize("made", ALL, ids=str)
def test_states_are_finite_and_layer_norm_centres_each_token(made: Recursion) -> None:
    signal = propagate(made, 12, 3, seed=1)
    assert len(signal.states) == 4
    for x in signal.states:
        assert bool(torch.isfinite(x).all())
    last = signal.states[-1].detach()
    if made.norm:
        torch.testing.assert_close(last.mean(1), torch.zeros(12).double(), atol=1e-9, rtol=0)
        size = last.square().mean(1)
        assert (size < 1 + 1e-9).all()
        if not made.centred:  # the fix may empty a token, and LayerNorm's eps leaves it empty
            torch.testing.assert_close(size, torch.ones(12).double(), atol=0.01, rtol=0)


def test_without_mask_the_fix_takes_the_mean_away() -> None:
    """1^T does not vanish in general, but (A - U) gives constant tokens nothing."""
    for attention in ("markov", "softmax"):
        made = Recursion(attention=attention, centred=True)  # type: ignore[arg-type]
        equal = torch.ones(9, 1).double() * torch.arange(9).double()
        assert float(made.step(equal, torch.eye(9).double(), seed=3).abs().max()) < 1e-12


def test_rank_collapses_in_width_and_the_fix_holds_it() -> None:
    """papers.md: after one layer, as T grows; A - U and W have 3/(27/4)^2 T in the limit."""
    for n in (50, 200):
        plain = stable_rank(propagate(Recursion(), n, 1, seed=0).states[1].detach())
        fixed = stable_rank(propagate(Recursion(centred=True), n, 1, seed=0).states[1].detach())
        assert plain < 1.2
        assert fixed == pytest.approx(words.LIMIT * n, rel=0.35)
    assert plain < 1.03


# -- gradients ----------------------------------------------------------------------------------


def jacobian_norms(made: Recursion, n: int, depth: int, seed: int) -> list[float]:
    """The whole Jacobian, entry by entry."""
    signal = propagate(made, n, depth, seed=seed)
    rows = []
    for entry in signal.states[-1].flatten():
        rows.append(torch.autograd.grad(entry, signal.weights, retain_graph=True))
    return [
        float(torch.stack([r[layer] for r in rows]).norm()) for layer in range(len(signal.weights))
    ]


@pytest.mark.parametrize(
    "made",
    [
        Recursion(),
        Recursion(centred=True, norm=True),
        Recursion(attention="softmax", skip=True),
        Recursion(attention="softmax", causal=True, centred=True, norm=True, skip=True),
    ],
    ids=str,
)
def test_gradient_norms_are_those_of_the_whole_jacobian(made: Recursion) -> None:
    wanted = jacobian_norms(made, 7, 3, 2)
    signal = propagate(made, 7, 3, seed=2)
    got = gradient_norms(signal, probes=400, seed=1)
    np.testing.assert_allclose(got, wanted, rtol=0.15)


def test_gradients_of_the_linear_network_have_a_closed_form() -> None:
    """|dX_L/dW_l|_F = |A_L..A_l X_l|_F |W_{l+1}..W_L|_F."""
    signal = propagate(Recursion(), 10, 2, seed=4)
    x0, x1, _ = (x.detach() for x in signal.states)
    w0, w1 = (w.detach() for w in signal.weights)
    a1 = signal.states[2].detach() @ torch.linalg.pinv(w1) @ torch.linalg.pinv(x1)
    a0 = x1 @ torch.linalg.pinv(w0) @ torch.linalg.pinv(x0)
    first = float((a1 @ a0 @ x0).norm() * w1.norm())
    last = float((a1 @ x1).norm()) * math.sqrt(10)
    got = gradient_norms(signal, probes=2000)
    np.testing.assert_allclose(got, [first, last], rtol=0.1)


# -- seeds, and what is refused -----------------------------------------------------------------


def test_seeds_decide_all_and_the_global_state_is_left() -> None:
    before = torch.get_rng_state()
    with shape_checks_off():
        one, other = (propagate(ALL[-1], 10, 2, seed=3).states[-1] for _ in range(2))
        assert torch.equal(one, other)
        assert not torch.equal(one, propagate(ALL[-1], 10, 2, seed=4).states[-1])
        gradient_norms(propagate(ALL[-1], 10, 2, seed=3), probes=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_markov(0, seed=1), "n_tokens: wanted an integer from 1 to"),
        (lambda: random_markov(3, seed=-1), "seed: wanted an integer >= 0; got -1"),
        (lambda: propagate(Recursion(), 5, 0, seed=1), "depth: wanted an integer from 1 to"),
        (
            lambda: propagate(Recursion(), 5, 1, seed=1, width=4),
            "width: wanted an integer from 5",
        ),
        (lambda: Recursion(attention="sparse"), "attention: wanted one of"),  # type: ignore[arg-type]
        (lambda: Recursion(gain=0.0), "gain: wanted a number > 0; got 0.0"),
        (lambda: Recursion(gain="1"), "gain: wanted a number > 0; got '1'"),  # type: ignore[arg-type]
        (lambda: Recursion(gain=True), "gain: wanted a number > 0; got True"),
        (lambda: Recursion(causal="no"), "causal: wanted True or False; got 'no'"),  # type: ignore[arg-type]
        (lambda: Recursion(skip=1), "skip: wanted True or False; got 1"),  # type: ignore[arg-type]
        (lambda: random_softmax(torch.eye(3), seed=0), r"x: wanted .* float64; got .*float32"),
        (lambda: random_softmax(torch.ones(3).double(), seed=0), r"x: wanted .*; got \[3\]"),
        (lambda: random_softmax(EYE, seed=0, d_head=0), "d_head: wanted an integer from 1 to"),
        (lambda: gradient_norms(propagate(Recursion(), 3, 1, seed=0), probes=0), "probes: wanted"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    with shape_checks_off(), pytest.raises((ValueError, TypeError), match=message):
        call()


# -- the experiment spectrum ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    subjects = find_subjects(["study-pre-1", "study-qkv-1"])
    out = tmp_path_factory.mktemp("spectrum")
    return running.run_experiment(SPECTRUM, subjects, out, size="smoke", progress=False)


def test_it_reads_the_same_from_disk(outcome: Any) -> None:
    again = running.read_table(outcome.folder)
    assert list(again.columns) == list(spectrum.COLUMNS)
    assert spectrum_words.text(again) == outcome.text
    assert spectrum_words.claims(again) == spectrum_words.claims(outcome.table)
    assert (outcome.folder / "figure.png").stat().st_size > 10_000


def test_its_numbers_are_the_librarys(outcome: Any) -> None:
    table = outcome.table
    for seed in (0, 1):
        for mask in ("none", "causal"):
            at = {"attention": "markov", "mask": mask, "tokens": 50, "seed": seed}
            got = pick(table, what="spectrum", quantity="s2", **at)["value"].item()
            wanted = svd(random_markov(50, seed=seed, causal=mask == "causal"))[1]
            assert got == pytest.approx(wanted)
    got = pick(
        table, what="depth", quantity="stable rank", attention="markov", mask="none", fix=1,
        norm=0, skip=1, layer=3, seed=1,
    )["value"].item()  # fmt: skip
    signal = propagate(Recursion(centred=True, skip=True), 20, 3, seed=1)
    assert got == pytest.approx(stable_rank(signal.states[-1].detach()))


def test_every_model_has_its_rows_trained_and_untrained(outcome: Any) -> None:
    table = outcome.table
    for name in ("study-pre-1", "study-qkv-1"):
        mine = table[table["model"] == name]
        assert set(mine["what"]) == {"trained", "start"}
        masked = pick(mine, what="start", mask="causal", tokens=50)
        of = masked.groupby("quantity")["value"].first()
        assert of["uniform_s1"] == pytest.approx(svd(uniform(50, causal=True))[0])
        free = pick(mine, what="start", mask="none", tokens=50, quantity="uniform_gap")
        np.testing.assert_allclose(free["value"], 1)


def test_the_random_start_is_the_untrained_model() -> None:
    """Same seed, same weights as a model that is made of its configuration."""
    subject = find_subjects(["study-pre-1"])[0]
    bridge, ids = spectrum.random_start(subject, "causal", 32)
    assert ids.shape == (2, 32)
    from qkvnorm_lens.models.config import named_config
    from qkvnorm_lens.models.model import QKVNormTransformer

    fresh = QKVNormTransformer(named_config("study", "pre", seed=1)).eval()
    with torch.no_grad():
        torch.testing.assert_close(bridge(ids), fresh(ids))


def test_claims_follow_the_numbers(outcome: Any) -> None:
    """Turn what the fix does around in the table, and the claims turn with it."""
    said = {c.what[:30]: c.same for c in spectrum_words.claims(outcome.table)}
    turned = outcome.table.copy()
    turned["fix"] = 1 - turned["fix"]
    again = {c.what[:30]: c.same for c in spectrum_words.claims(turned)}
    width = next(k for k in said if k.startswith("with the fix the stable"))
    depth = next(k for k in said if k.startswith("the fix keeps rank in depth"))
    assert again[width] == "no"
    assert said[width] != "no"
    assert said[depth] in ("yes", "in part")
    assert again[depth] == "no"


def of_network(table: pd.DataFrame, what: str, **more: Any) -> pd.Series[bool]:
    wanted = {"what": what, "attention": "softmax", "mask": "causal", "norm": 0, "skip": 1} | more
    chosen = pd.Series(True, index=table.index)
    for column, value in wanted.items():
        chosen &= table[column] == value
    return chosen


def line_of(said: str, start: str) -> str:
    return next(line for line in said.splitlines() if line.startswith(f"| {start}"))


def test_dead_seeds_are_counted(outcome: Any) -> None:
    """A seed with nothing left stands in the text, and no claim counts it as a gain."""
    table = outcome.table.copy()
    name = "softmax, causal, A - U, skip"
    assert " of " not in line_of(spectrum_words.text(table), name)
    last = int(table.loc[table["what"] == "depth", "layer"].max())
    table.loc[of_network(table, "depth", fix=1, layer=last, seed=0), "value"] = math.nan
    table.loc[of_network(table, "gradient", fix=1, layer=0, seed=0), "value"] = 0.0
    line = line_of(spectrum_words.text(table), name)
    assert "(1 of 2 seeds; nothing left of the others)" in line
    assert "(1 of 2 seeds, 0 in the others)" in line
    table.loc[of_network(table, "depth", fix=1, layer=last), "value"] = math.nan
    assert line_of(spectrum_words.text(table), name).startswith(f"| {name} | nothing left |")
    spectrum_words.claims(table)


@given(st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=6), st.integers(0, 3))
def test_gradients_are_geometric_means_over_living_seeds(values: list[float], dead: int) -> None:
    found = words.sizes(pd.Series([*values, *[0.0, math.nan, 0.0][:dead]]))
    assert found.centre == pytest.approx(math.prod(v ** (1 / len(values)) for v in values))
    assert (found.least, found.most) == (min(values), max(values))
    assert (found.n, found.of) == (len(values), len(values) + dead)
    assert math.isinf(found.away(1.0)) == (dead > 0)
    scaled = words.sizes(pd.Series(values) * 7)
    assert scaled.centre == pytest.approx(7 * found.centre)


def test_the_size_that_gradients_are_held_by_is_one_layers(outcome: Any) -> None:
    """|dX_1/dW_0|_F of the fix alone, as the backward passes have it."""
    for attention, mask in words.DEEP:
        made = Recursion(attention=attention, causal=mask == "causal", centred=True)  # type: ignore[arg-type]
        wanted = [
            gradient_norms(propagate(made, 20, 1, seed=s), probes=400)[0] for s in range(20, 26)
        ]
        got = words.of_one_layer(outcome.table, attention, mask, 20)
        assert got == pytest.approx(np.mean(wanted), rel=0.15)


def test_softmax_under_a_causal_mask_is_run_in_depth(outcome: Any) -> None:
    table = outcome.table
    got = table.loc[of_network(table, "depth", fix=1, norm=1, layer=3, seed=1), "value"].item()
    made = Recursion(attention="softmax", causal=True, centred=True, norm=True, skip=True)
    assert got == pytest.approx(stable_rank(propagate(made, 20, 3, seed=1).states[-1].detach()))
    depth, gradient = (
        next(c for c in spectrum_words.claims(table) if c.what.startswith(start))
        for start in ("the fix keeps rank in depth", "the gap worsens")
    )
    assert "softmax, causal:" in depth.ours
    assert "softmax, causal:" in gradient.ours
    scaled = table["scaled"] == 1
    assert scaled.any()
    assert set(table.loc[scaled, "mask"]) == {"none"}  # sqrt(T) keeps lengths there alone
    # A table that was made before it was run is read too.
    old = table[~((table["attention"] == "softmax") & (table["mask"] == "causal"))]
    old = pd.concat([old, table[table["what"].isin(["spectrum", "width"])]]).drop_duplicates()
    assert "softmax, causal:" not in " ".join(c.ours for c in spectrum_words.claims(old))
    assert "softmax, causal, A, neither" not in spectrum_words.text(old)


def test_each_stable_rank_is_named_and_defined(outcome: Any) -> None:
    said = outcome.text
    for header in ("stable rank of XX^T, one layer", "stable rank of A |"):
        assert header in said
    for definition in ("XX^T: |S|_F²/|S|_2² of S = XX^T", "Stable rank of A: |A|_F²/s1²"):
        assert definition in said
    assert "| stable rank |" not in said


# -- the experiment centring ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of one small model under the names of the runs, and logs made by hand."""
    source = train.MODELS / "study-pre-1"
    for placement, groups in centring.PAIRS.items():
        for seed in centring.SEEDS:
            for fix, group in enumerate(groups):
                path = tmp_path / f"{group}-{seed}"
                shutil.copytree(source, path)
                card = json.loads((path / "card.json").read_text())
                card["run"]["seed"] = seed
                card["run"]["config"] |= {"centred": True} if fix else {}
                (path / "card.json").write_text(json.dumps(card))
                config = json.loads((path / "config.json").read_text())
                config["placement"] = placement
                config |= {"norm": None} if placement == "none" else {}
                # Only the first is loaded and run (the smoke form): its weights fit.
                (path / "config.json").write_text(json.dumps(config))
                write_log(path / "log.csv", [2.0 - 0.5 * fix - 0.01 * seed] * 10)
    monkeypatch.setattr(studies, "MODELS", tmp_path)
    return tmp_path


def write_log(path: Path, losses: list[float]) -> None:
    steps = range(100, 100 * len(losses) + 1, 100)
    pd.DataFrame({"step": steps, "loss": losses}).to_csv(path, index=False)


def test_it_reads_the_logs(folder: Path, tmp_path: Path) -> None:
    out = running.run_experiment(CENTRING, (), tmp_path / "out", size="smoke", progress=False)
    table = out.table
    assert list(table["model"].unique()) == ["confound-pre-1", "centred-pre-1"]
    curve = table[(table["what"] == "curve") & (table["fix"] == 1)]
    assert curve["step"].tolist() == list(range(100, 1001, 100))
    np.testing.assert_allclose(curve["value"], 1.49)
    found = centring.gain(table, "pre", centring.FINAL)
    assert found.value == pytest.approx(-0.5)
    assert found.n == 1
    assert "final loss -0.500" in out.text
    assert centring_words.claims(table)[0].same == "not decided"  # one seed decides nothing
    # The same weights twice: what is measured on the models does not differ.
    for quantity in centring.SPECTRUM:
        assert centring.gain(table, "pre", quantity).value == pytest.approx(0)
    same = centring.gain(table, "pre", "accuracy", "in distribution")
    assert same.value == pytest.approx(0)
    again = running.read_table(out.folder)
    assert centring_words.text(again) == out.text


@given(
    st.lists(st.floats(-0.3, 0.3), min_size=3, max_size=3),
    st.sampled_from([-0.5, 0.5]),
)
def test_differences_are_taken_within_a_seed(shift: list[float], gain: float) -> None:
    """What seeds have in common drops out."""
    rows = []
    for placement in centring.PAIRS:
        for seed, of in enumerate(shift):
            for fix in (0, 1):
                for quantity in (centring.FINAL, centring.WHOLE):
                    value = 2 + of + fix * (gain + 0.001 * seed)
                    rows.append((placement, seed, fix, "number", quantity, PLAIN, value))
    columns = ["placement", "seed", "fix", "what", "quantity", "variant", "value"]
    table = pd.DataFrame(rows, columns=columns)
    found = centring.gain(table, "pre", centring.FINAL)
    assert found.value == pytest.approx(gain + 0.001)
    assert found.n == 3
    assert {c.same for c in centring_words.claims(table)} == {"yes" if gain < 0 else "no"}


def test_missing_runs_are_named_with_their_command(folder: Path) -> None:
    for name in ("centred-pre-2", "confound-pre-3"):
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"train centred-pre-2 confound-pre-3$"):
        centring.parts((), "full")
    assert len(centring.parts((), "smoke")) == 2


def test_runs_that_differ_in_more_than_the_fix_are_refused(folder: Path) -> None:
    assert len(centring.parts((), "full")) == 2 * len(centring.SEEDS)
    path = folder / "centred-pre-1" / "card.json"
    card = json.loads(path.read_text())
    card["run"]["steps"] = 17
    path.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"differ in the fix alone; got .*steps"):
        centring.parts((), "full")


def test_the_runs_that_are_trained_are_such_pairs() -> None:
    """The command's own runs: equal but for the fix."""
    from qkvnorm_lens.training.run import describe

    known = train.runs()
    for plain, fixed in centring.PAIRS.values():
        for seed in centring.SEEDS:
            one, other = (describe(known[f"{group}-{seed}"]) for group in (plain, fixed))
            assert other["config"].pop("centred") is True
            assert one == other
