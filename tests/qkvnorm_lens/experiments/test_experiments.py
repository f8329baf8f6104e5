"""How experiments run: parts, resumption, tables; and the ones that have no file of their own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from scipy import stats

import hooks
from qkvnorm_lens import experiments
from qkvnorm_lens.cli import main
from qkvnorm_lens.experiments import train
from qkvnorm_lens.experiments.beyond.gauge import measure as gauge
from qkvnorm_lens.experiments.core import running, stats as core_stats, studies
from qkvnorm_lens.experiments.core.base import Claim, Experiment, Part
from qkvnorm_lens.experiments.core.grouped import PLAIN
from qkvnorm_lens.experiments.core.subjects import default_subjects, find_subjects
from qkvnorm_lens.experiments.paper.accuracy import EXPERIMENT as ACCURACY, measure as accuracy
from qkvnorm_lens.experiments.paper.collapse import (
    EXPERIMENT as COLLAPSE,
    measure as collapse,
    words as collapse_words,
)
from qkvnorm_lens.training.run import get_task
from tests.support import models
from tests.support.counting import NOBODY, Counting
from tests.support.paths import RESULTS
from tests.support.watching import shape_checks_off


def test_a_stopped_run_goes_on_and_ends_with_the_same_table(tmp_path: Path) -> None:
    whole = Counting()
    wanted = running.run_experiment(
        whole.experiment(), [NOBODY], tmp_path / "whole", progress=False
    )
    stopped = Counting(fail_at="c")
    with pytest.raises(KeyboardInterrupt):
        running.run_experiment(stopped.experiment(), [NOBODY], tmp_path / "cut", progress=False)
    assert stopped.worked == ["a", "b"]
    assert not (tmp_path / "cut" / "counting" / "table.csv").exists()
    again = Counting()
    got = running.run_experiment(again.experiment(), [NOBODY], tmp_path / "cut", progress=False)
    assert again.worked == ["c"]
    pd.testing.assert_frame_equal(got.table, wanted.table, check_exact=True)
    for name in ("table.csv", "text.md"):
        of = (tmp_path / where / "counting" / name for where in ("whole", "cut"))
        assert len({path.read_bytes() for path in of}) == 1


def test_a_table_is_read_back_number_for_number(tmp_path: Path) -> None:
    outcome = running.run_experiment(Counting().experiment(), [NOBODY], tmp_path, progress=False)
    back = running.read_table(outcome.folder)
    pd.testing.assert_frame_equal(back, outcome.table, check_exact=True)
    assert outcome.table["x"].iloc[2] == math.inf
    assert math.isnan(outcome.table["x"].iloc[1])


@pytest.mark.parametrize("change", ["settings", "version", "size", "model"])
def test_parts_that_depend_on_something_else_are_run_again(tmp_path: Path, change: str) -> None:
    running.run_experiment(
        Counting().experiment(), [NOBODY], tmp_path, size="quick", progress=False
    )
    other = Counting()
    version, size = 1, "quick"
    if change == "settings":
        other.settings = {"n": 4}
    elif change == "version":
        version = 2
    elif change == "size":
        size = "full"
    else:
        other.subject = dataclasses.replace(NOBODY, digest="other weights")
    running.run_experiment(other.experiment(version), [NOBODY], tmp_path, size=size, progress=False)
    assert other.worked == ["a", "b", "c"]


@pytest.mark.parametrize("left", ["", "[]", '{"depends_on": ', '{"rows": [[1]]}'])
def test_a_damaged_part_is_made_again(tmp_path: Path, left: str) -> None:
    first = running.run_experiment(Counting().experiment(), [NOBODY], tmp_path, progress=False)
    (first.folder / "parts" / "quick" / "b.json").write_text(left)
    again = Counting()
    second = running.run_experiment(again.experiment(), [NOBODY], tmp_path, progress=False)
    assert again.worked == ["b"]
    pd.testing.assert_frame_equal(second.table, first.table, check_exact=True)


def test_a_small_run_does_not_replace_a_large_one(tmp_path: Path) -> None:
    running.run_experiment(Counting().experiment(), [NOBODY], tmp_path, size="full", progress=False)
    small = Counting()
    with pytest.raises(ValueError, match=r"out: wanted another directory for a smoke run"):
        running.run_experiment(small.experiment(), [NOBODY], tmp_path, size="smoke", progress=False)
    assert not small.worked
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match="out: wanted a directory; got a file"):
        running.run_experiment(small.experiment(), [NOBODY], file, progress=False)
    assert not small.worked


def test_a_column_of_nothing_but_nan_stays_one_of_numbers(tmp_path: Path) -> None:
    """In the table of a run, in the one that its parts make again, and on disk."""
    frame = pd.DataFrame({"a": ["x", "y"], "b": [math.nan, math.nan]})
    part = Part("only", lambda: frame, NOBODY, {})
    experiment = dataclasses.replace(Counting().experiment(), parts=lambda subjects, size: [part])
    for _ in range(2):
        outcome = running.run_experiment(experiment, [NOBODY], tmp_path, progress=False)
        assert outcome.table["b"].dtype == float
    assert running.read_table(outcome.folder)["b"].dtype == float


def test_two_parts_of_one_key_are_refused(tmp_path: Path) -> None:
    twice = Counting()
    experiment = twice.experiment()
    parts = experiment.parts
    doubled = Experiment(**{**vars(experiment), "parts": lambda s, n: [*parts(s, n), *parts(s, n)]})
    with pytest.raises(ValueError, match="parts of different keys"):
        running.run_experiment(doubled, [NOBODY], tmp_path, progress=False)
    assert not twice.worked


def test_a_model_that_adds_nothing_is_refused_where_sums_are_wanted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accuracy: wanted a model that adds integers; got"):
        running.run_experiment(ACCURACY, [NOBODY], tmp_path, progress=False)


# -- means and intervals --------------------------------------------------------------------


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9), st.floats(-5, 5))
def test_an_interval_moves_with_the_numbers_and_is_students(x: list[float], c: float) -> None:
    m, moved = core_stats.mean(x), core_stats.mean([v + c for v in x])
    assert moved.value == pytest.approx(m.value + c, abs=1e-9)
    assert moved.half == pytest.approx(m.half, abs=1e-9)
    wanted = stats.t.interval(0.95, len(x) - 1, np.mean(x), max(stats.sem(x), 1e-300))
    assert m.half == pytest.approx((wanted[1] - wanted[0]) / 2, abs=1e-9)


def test_one_seed_has_no_interval_and_decides_nothing() -> None:
    alone = core_stats.mean([0.3])
    assert math.isnan(alone.half)
    assert not alone.excludes_zero
    assert alone.percent() == "30.0"
    assert not core_stats.difference([0.9], [0.1, 0.2]).excludes_zero


def test_a_difference_has_welchs_interval() -> None:
    a, b = [0.1, 0.2, 0.4], [0.3, 0.35, 0.5]
    got = core_stats.difference(a, b)
    va, vb = np.var(a, ddof=1) / 3, np.var(b, ddof=1) / 3
    dof = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 2)
    assert got.half == pytest.approx(stats.t.ppf(0.975, dof) * math.sqrt(va + vb))
    assert got.value == pytest.approx(np.mean(a) - np.mean(b))


@given(st.integers(-(10**6), 10**6), st.integers(0, 10**6))
def test_an_interval_of_equal_sides_is_said_by_its_half(value: int, half: int) -> None:
    x, h = value / 64, half / 64  # sums of these are exact
    found = core_stats.Mean.around(x, h, 3)
    assert found.words(".6f", ".3f") == f"{x:.6f} ± {h:.3f}"
    assert found.half == h
    assert core_stats.Mean(x, x - h, x + h + 1, 3).words(".6f") == (
        f"{x:.6f} ({x - h:.6f} to {x + h + 1:.6f})"
    )


SHARES = st.lists(st.integers(0, 10**6).map(lambda n: n / 10**6), min_size=2, max_size=9)


@given(SHARES)
def test_an_interval_of_shares_keeps_to_what_shares_can_be(x: list[float]) -> None:
    """It holds the mean, narrows with seeds, and that of 1 - x is its mirror image."""
    found = core_stats.share(x)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(np.mean(x))
    other = core_stats.share([1 - v for v in x])
    assert (other.low, other.high) == pytest.approx((found.rest.low, found.rest.high), abs=1e-7)
    more = core_stats.share(x * 2)
    if np.ptp(x):
        assert more.half < found.half
    assert found.low - 1e-12 <= more.low
    assert more.high <= found.high + 1e-12


@given(SHARES)
def test_the_ends_of_a_shares_interval_are_t_standard_errors_off(x: list[float]) -> None:
    """Of the error that seeds with that mean would have: the variance goes with p (1 - p)."""
    found = core_stats.share(x)
    t = stats.t.ppf(0.975, len(x) - 1)
    of_one = np.mean(x) * (1 - np.mean(x))
    for p in (found.low, found.high):
        error = 0.0 if not of_one else stats.sem(x) * math.sqrt(p * (1 - p) / of_one)
        assert abs(found.value - p) == pytest.approx(t * error, rel=1e-5, abs=1e-9)


def test_the_interval_of_many_yes_and_no_is_wilsons() -> None:
    wanted = stats.binomtest(30, 3000).proportion_ci(method="wilson")
    found = core_stats.share([0.0] * 2970 + [1.0] * 30)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=2e-3)


@given(st.lists(st.floats(0.48, 0.52), min_size=3, max_size=9))
def test_in_the_middle_a_shares_interval_is_students(x: list[float]) -> None:
    found, plain = core_stats.share(x), core_stats.mean(x)
    for ours, theirs in ((found.low, plain.low), (found.high, plain.high)):
        assert ours == pytest.approx(theirs, abs=0.05 * plain.half + 1e-12)


@pytest.mark.parametrize("n", [3, 6])
def test_shares_near_zero_are_covered_as_said(n: int) -> None:
    """Of skewed shares whose mean is a percent; a symmetric interval misses it more often."""
    seeds = np.random.default_rng(0).beta(0.98, 97.0, (1500, n))  # their deviation is a percent too
    found = {
        over: [over(x) for x in seeds.tolist()] for over in (core_stats.share, core_stats.mean)
    }
    held, of_t = (
        np.mean([m.low <= 0.98 / 97.98 <= m.high for m in each]) for each in found.values()
    )
    assert held >= max(0.9, of_t)


def test_three_shares_of_which_two_are_zero() -> None:
    found = core_stats.share([0.0, 0.0, 0.024])
    assert core_stats.mean([0.0, 0.0, 0.024]).low < 0 < found.low
    assert found.percent() == "0.8 (0.0 to 14.3)"
    assert found.rest.percent(0) == "99 (86 to 100)"


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_seeds_of_one_share_have_no_width(x: float) -> None:
    found = core_stats.share([x] * 3)
    assert (found.low, found.high) == (x, x)
    assert found.percent() == f"{100 * x:.1f} ± 0.0"
    alone = core_stats.share([x])
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert alone.percent() == f"{100 * x:.1f}"


@given(SHARES, SHARES)
def test_a_difference_of_shares_lies_between_those_of_all_and_nothing(
    a: list[float], b: list[float]
) -> None:
    plain, found = core_stats.difference(a, b), core_stats.difference(a, b, shares=True)
    assert found.low == max(plain.low, -1)
    assert found.high == min(plain.high, 1)
    assert found.value == plain.value
    assert found.error == plain.error


@given(SHARES, st.floats(0.01, 0.99))
def test_as_many_seeds_of_shares_as_are_wanted_decide(x: list[float], bound: float) -> None:
    """By the rule of a share's interval, if further seeds have this mean and spread."""
    found = core_stats.share(x)
    n, s, at = core_stats.seeds_wanted(found, bound), np.std(x, ddof=1), np.mean(x)
    scale = math.sqrt(bound * (1 - bound) / (at * (1 - at))) if 0 < at < 1 else 0.0

    def reach(seeds: int) -> float:
        return float(stats.t.ppf(0.975, seeds - 1) * s * scale / math.sqrt(seeds))

    apart = abs(at - bound)
    assert reach(10_000 if n is None else max(n - 1, 2)) >= apart * (1 - 1e-9) or n == 2
    if n is not None:
        assert reach(n) < apart * (1 + 1e-9)
    decided = found.low > bound or found.high < bound
    if abs(reach(len(x)) - apart) > 1e-6:
        assert decided == (n is not None and n <= len(x))


def test_an_error_bar_ends_where_its_interval_does() -> None:
    from qkvnorm_lens.experiments.core import error_bar, panels

    found = core_stats.share([0.0, 0.0, 0.024])
    for across in (False, True):
        _, (ax,) = panels(1, 1)
        error_bar(ax, 2, found, across=across)
        error_bar(ax, 3, core_stats.share([0.5]), across=across)  # one seed: nothing to draw
        (_, _, (bars,)), (_, _, (none,)) = ax.containers
        ends = bars.get_segments()[0][:, 0 if across else 1]
        assert ends == pytest.approx([100 * found.low, 100 * found.high])
        assert np.ptp(none.get_segments()[0], axis=0).max() == 0


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=6), st.floats(-5, 5))
def test_as_many_seeds_as_are_wanted_decide_and_one_less_does_not(
    x: list[float], bound: float
) -> None:
    """If further seeds have the mean and the spread of those so far."""
    found = core_stats.mean(x)
    n = core_stats.seeds_wanted(found, bound)
    spread, apart = np.std(x, ddof=1), abs(np.mean(x) - bound)

    def half(seeds: int) -> float:
        return float(stats.t.ppf(0.975, seeds - 1) * spread / math.sqrt(seeds))

    if n is None:
        assert half(10_000) >= apart * (1 - 1e-9)
    else:
        assert half(n) < apart * (1 + 1e-9)
        assert n == 2 or half(n - 1) >= apart * (1 - 1e-9)


def test_what_would_decide_it_is_said() -> None:
    few = core_stats.difference([0.1, 0.2, 0.4], [0.3, 0.35, 0.5])
    n = core_stats.seeds_wanted(few)
    assert core_stats.power(few).endswith(f"it takes {n} seeds to decide it")
    more = core_stats.seeds_wanted(few, -0.14)
    assert more > n > few.n
    assert f"takes {more} seeds" in core_stats.power(few, 0.0, -0.14)
    assert f"takes {n} seeds" in core_stats.power(few, 0.0, -0.14, either=True)
    assert core_stats.power(core_stats.mean([0.3])).startswith("one seed has no interval")
    assert "not even 10,000" in core_stats.power(core_stats.mean([1.0, -1.0, 0.0]))


# -- which models ---------------------------------------------------------------------------


def test_the_default_models_are_there_and_known_by_placement_and_seed() -> None:
    full = default_subjects("full")
    cells = {(s.placement, s.seed) for s in full if s.group.startswith("study-")}
    assert cells >= {(p, n) for p in ("none", "pre", "qkv") for n in (1, 2, 3)}
    assert cells <= {(p, n) for p, most in studies.STUDY_SEEDS.items() for n in range(1, most + 1)}
    assert {s.kind for s in full} == {"addition"}
    assert len({s.digest for s in full}) == len(full)
    for size in ("smoke", "quick"):
        assert {s.name for s in default_subjects(size)} < {s.name for s in full}


def test_trained_models_are_what_their_command_makes() -> None:
    """Card, configuration and run agree with `runs()`, for every model that comes along."""
    from qkvnorm_lens.training.run import describe

    known = train.runs()
    found = studies.trained()
    assert set(found) == set(known)
    for name, path in found.items():
        card = json.loads((path / "card.json").read_text())
        assert card["run"] == json.loads(json.dumps(describe(known[name]))), name
        assert card["command"] == f"python -m qkvnorm_lens.experiments.train {name}"
        own = json.loads(json.dumps(get_task(known[name].split).to_json()))
        assert card["run"]["split"] == own, name
        if "text" not in own:
            assert card["accuracy"]["in distribution"]["split"] == own, name
        kinds = {tensor.dtype for tensor in load_file(path / "model.safetensors").values()}
        rounded = name.startswith(("language-", "addition-"))
        assert kinds == {torch.bfloat16 if rounded else torch.float32}, name


def test_models_that_are_not_here_are_named_with_what_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkvnorm_lens.experiments.core import subjects
    from qkvnorm_lens.models import LoadError, find, is_experiment_model, loading

    assert all(map(is_experiment_model, train.runs()))
    assert not any(map(is_experiment_model, ["gpt2", "addition-pre", "my/study-pre-1", "order-1"]))
    monkeypatch.setattr(loading, "experiment_models", dict)
    monkeypatch.setattr(subjects, "trained", lambda prefix="": {})
    monkeypatch.chdir(tmp_path)
    for name in ("study-pre-1", "language-qk-2"):
        with pytest.raises(LoadError, match=f"experiments.train {name}` makes them"):
            find(name)
    with pytest.raises(LoadError, match=r"wanted the models study-\*; got none: they do not come"):
        find_subjects(["study"])
    names = [s.name for s in default_subjects("smoke")]
    assert names == ["addition-pre", "addition-qkv"]
    (tmp_path / "study-pre-1").mkdir()  # a directory of that name is what was meant
    (tmp_path / "study-pre-1" / "config.json").write_text("{}")
    assert find("study-pre-1").kind == "directory"


def test_models_by_name_directory_and_hub() -> None:
    names = ["study", "addition-pre", str(train.MODELS / "study-qkv-2"), "gpt2"]
    found = find_subjects(names)
    assert [s.name for s in found][-2:] == ["addition-pre", "gpt2"]
    assert len(found) == 2 + len(studies.trained("study-"))
    assert found[-1].kind == "language"
    assert find_subjects(["study-qkv-2"])[0].group == "study-qkv"


def test_one_byte_of_the_weights_makes_another_model(tmp_path: Path) -> None:
    """Also one in the middle of a large file."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = bytearray(6 << 20)
    (folder / "model.safetensors").write_bytes(weights)
    (before,) = find_subjects([str(folder)])
    weights[3 << 20] = 1
    (folder / "model.safetensors").write_bytes(weights)
    (after,) = find_subjects([str(folder)])
    assert before.digest != after.digest


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    for run in "ab":
        (tmp_path / run / "final").mkdir(parents=True)
        (tmp_path / run / "final" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="wanted directories of different names"):
        find_subjects([str(tmp_path / run / "final") for run in "ab"])
    with shape_checks_off(), pytest.raises(TypeError, match="models: wanted a list of names"):
        experiments.run("gauge", "addition-pre")


# -- collapse -------------------------------------------------------------------------------


def test_crossing_is_linear_between_points_and_never_is_inf() -> None:
    sigma, rate = pd.Series([0.1, 0.2, 0.3]), pd.Series([0.0, 0.005, 0.02])
    assert collapse.crossing(sigma, rate, 0.01) == pytest.approx(0.2 + 0.1 / 3)
    assert collapse.crossing(sigma, rate, 0.5) == math.inf
    assert collapse.crossing(sigma, rate, 0.0) == pytest.approx(0.1)


@pytest.mark.slow
def test_a_wrong_curve_would_be_seen() -> None:
    """The check that exact and sampled agree finds a curve that is off by a tenth."""
    (subject,) = find_subjects(["addition-pre"])
    table = collapse.measure(subject, "quick")
    z = collapse_words.disagreement(table)
    assert len(z) == 16
    assert float(z["z"].abs().max()) < 4.5
    wrong = table.copy()
    exact = (wrong["quantity"] == "loose") & (wrong["variant"] == PLAIN) & (wrong["layer"] == -1)
    wrong.loc[exact, "value"] *= 1.1
    assert float(collapse_words.disagreement(wrong)["z"].abs().max()) > 4.5


# -- gauge ----------------------------------------------------------------------------------


def test_own_level_of_the_sample_is_the_probes_rate() -> None:
    """With every row in the sample and no constant added, the rate is the report's."""
    model = models.tiny_llama()
    ids = models.tokens(3, 20).tolist()
    report = hooks.collapse_probe(model, ids, sigmas=[0.1], draws=0, progress=False)
    s_star, s, rivals = gauge.sparse_rows(model, ids, 10**6)
    assert len(s_star) == report.n_sparse
    rate = gauge.rate_at(s_star, s, rivals, 0.1, 0.0)
    assert rate == pytest.approx(float(report.loose.sum()) / report.n_sparse, abs=1e-6)
    level = float(report.level.sum()) / report.n_sparse
    assert float(s_star.mean()) == pytest.approx(level, rel=1e-5)


@given(shift=st.floats(0, 200), more=st.floats(0.5, 200))
def test_collapse_grows_with_the_level_of_positive_scores(shift: float, more: float) -> None:
    """Every competitor's ratio comes nearer to one; the pattern stays what it was."""
    s = torch.tensor([[9.0, 3.0, 1.0], [12.0, 4.0, 2.0]], dtype=torch.float64)
    rivals = torch.tensor([[False, True, True]] * 2)
    rates = [gauge.rate_at(s[:, 0], s, rivals, 0.2, c) for c in (shift, shift + more)]
    assert rates[1] >= rates[0]
    assert torch.allclose(s.softmax(-1), (s + shift + more).softmax(-1))


# -- the committed results ------------------------------------------------------------------

PAGES = RESULTS.parent / "docs" / "reproduction"


def _finished() -> list[Path]:
    return sorted(path.parent for path in RESULTS.rglob("about.json"))


def test_there_are_results_of_every_experiment() -> None:
    assert {path.name for path in _finished()} == set(experiments.NAMES)


@pytest.mark.parametrize("folder", _finished(), ids=lambda p: "-".join(p.parts[-2:]))
def test_results_say_where_they_come_from(folder: Path) -> None:
    about = json.loads((folder / "about.json").read_text())
    table = running.read_table(folder)
    experiment = experiments.get_experiment(folder.name)
    assert about["size"] == "full"
    command = about["command"]
    assert command.startswith(f"qkvnorm-lens experiment {folder.name} --full")
    assert command.endswith(f"--out results/{folder.parent.name}")
    assert set(running.VERSIONS) == set(about["versions"])
    assert about["settings"]
    if "model" in table and about["models"]:
        # Some experiments build models of their own beside those that they are given.
        built = {m for m in table["model"] if m.startswith(("constructed", "random-"))}
        assert set(table["model"]) - built == {m["model"] for m in about["models"]}
        assert not built or folder.name in ("spectrum", "symmetry")
    assert (folder / "text.md").read_text().rstrip() == experiment.text(table).rstrip()
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    for claim in experiment.claims(table):
        assert isinstance(claim, Claim)
        assert claim.power or claim.same != "not decided", claim.what


def test_the_page_is_made_of_the_results(tmp_path: Path) -> None:
    from qkvnorm_lens.experiments.core.report import compose, results

    made = compose(results(RESULTS), RESULTS, PAGES)
    assert {page.name: page.read_text(encoding="utf-8") for page in PAGES.iterdir()} == made
    assert set(made) == {"index.md", *(f"{name}.md" for name in experiments.NAMES)}


@pytest.mark.parametrize("folder", _finished(), ids=lambda p: "-".join(p.parts[-2:]))
def test_a_page_names_the_seeds_of_its_models(folder: Path) -> None:
    """All that the table has rows of, group by group."""
    page = (PAGES / f"{folder.name}.md").read_text(encoding="utf-8")
    where = "/".join(folder.parts[-3:])
    (line,) = (line for line in page.splitlines() if f"({'../' * 2}{where}/about.json)" in line)
    listed: dict[str, set[int]] = {}
    for said in filter(None, line.partition(" Seeds: ")[2].removesuffix(".").split("; ")):
        seeds, groups = said.split(" of ", 1)
        low, to, high = seeds.partition(" to ")
        span = range(int(low), int(high) + 1) if to else map(int, seeds.split(", "))
        named = set(span)
        listed |= dict.fromkeys(groups.split(", "), named)
    table = running.read_table(folder)
    if {"group", "seed"} <= set(table):
        for group, seeds in table.groupby("group")["seed"]:
            known = {int(n) for n in seeds.dropna().unique() if n >= 0}
            built = str(group).startswith(("constructed", "random"))
            assert known <= listed.get("what is made here" if built else group, set()), group


def _claimed(page: Path) -> list[str]:
    """Rows of the first table, of claims."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if "| published | ours |" in line), len(lines))
    return list(itertools.takewhile(lambda line: line.startswith("| "), lines[start + 2 :]))


def test_no_claim_counts_twice() -> None:
    """Parts without a model are in the results of our models and of SmolLM2."""
    rows = _claimed(PAGES / "index.md")
    assert len(rows) > 60
    assert len(rows) == len(set(rows))


def test_the_summary_has_the_claims_of_all_pages_and_counts_them() -> None:
    rows = [
        f"| [{name}]({name}.md) {row.rpartition('** | ')[0]}** |"
        for name in experiments.NAMES
        for row in _claimed(PAGES / f"{name}.md")
    ]
    assert rows == _claimed(PAGES / "index.md")
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    (line,) = (line for line in index.splitlines() if line.startswith("The same: "))
    counted = dict(re.findall(r"([a-z][a-z ]+|-) (\d+)", line.partition(" (")[0]))
    assert sum(map(int, counted.values())) == len(rows)
    for same, n in counted.items():
        assert sum(row.endswith(f"**{same}** |") for row in rows) == int(n)


def test_pages_go_into_a_directory(tmp_path: Path) -> None:
    from qkvnorm_lens.experiments.core.report import write_report

    (tmp_path / "page.md").touch()
    with pytest.raises(NotADirectoryError, match="to: wanted a directory; got the file"):
        write_report(RESULTS, tmp_path / "page.md")


@pytest.mark.parametrize("damage", ["table", "figure", "about"])
def test_half_a_result_is_not_reported(tmp_path: Path, damage: str) -> None:
    from qkvnorm_lens.experiments.core.report import write_report

    folder = tmp_path / "accuracy"
    shutil.copytree(RESULTS / "addition" / "accuracy", folder)
    write_report(tmp_path, tmp_path / "pages")
    name = {"table": "table.csv", "figure": "figure.png", "about": "about.json"}[damage]
    if damage == "figure":
        (folder / name).unlink()
    else:
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) // 2 - len(text) // 2 % 2].rpartition("\n")[0])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        write_report(tmp_path, tmp_path / "pages")


@pytest.mark.slow
def test_a_number_of_the_results_is_made_again() -> None:
    """One model's accuracies and collapse curve, computed anew, are those of the table."""
    (subject,) = find_subjects(["study-pre-1"])
    for experiment, columns, tolerance in (
        (ACCURACY, ["kind"], 2e-4),
        (COLLAPSE, ["quantity", "variant", "layer", "sigma"], 1e-5),
    ):
        held = running.read_table(RESULTS / "addition" / experiment.name)
        mine = held[held["model"] == subject.name].reset_index(drop=True)
        (part,) = (p for p in experiment.parts((subject,), "full"))
        made = part.work().reset_index(drop=True)
        assert len(made) == len(mine)
        value = "per_token" if "per_token" in mine else "value"
        for column in columns:
            assert list(made[column].fillna(-9)) == list(mine[column].fillna(-9))
        # Another processor rounds otherwise: a row at the threshold may change sides.
        np.testing.assert_allclose(made[value], mine[value], rtol=20 * tolerance, atol=tolerance)


def test_exact_and_sampled_agree_in_every_committed_curve() -> None:
    found = [path for path in _finished() if path.name == "collapse"]
    assert found
    for folder in found:
        z = collapse_words.disagreement(running.read_table(folder))["z"].abs()
        assert float(z.max()) < 4.5, folder
        assert float((z > 2).mean()) < 0.2, folder


# -- the command ----------------------------------------------------------------------------


def test_the_command_lists_runs_and_goes_on(tmp_path: Path, capsys: Any) -> None:
    assert main(["experiment", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in experiments.NAMES)
    arguments = ["experiment", "accuracy", "--smoke", "--model", "addition-qkv"]
    with shape_checks_off():
        assert main([*arguments, "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    assert "addition-qkv" in first
    table = running.read_table(tmp_path / "accuracy")
    assert list(table["kind"]) == list(accuracy.KINDS)
    before = (tmp_path / "accuracy" / "parts" / "smoke" / "addition-qkv.json").stat().st_mtime_ns
    assert main([*arguments, "--format", "pdf", "--out", str(tmp_path)]) == 0
    drawn = {path.name for path in (tmp_path / "accuracy").glob("figure.*")}
    assert drawn == {"figure.png", "figure.pdf"}
    assert b"/FontFile2" in (tmp_path / "accuracy" / "figure.pdf").read_bytes()
    after = (tmp_path / "accuracy" / "parts" / "smoke" / "addition-qkv.json").stat().st_mtime_ns
    assert before == after
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--model", "no/such/model/here"], "no/such/model/here"),
        (["report", "--out", "."], "wanted a directory with results"),
        (["accuracy", "--to", "pages"], "--to: wanted `experiment report`"),
        (["report", "--to", "a.file"], "--to: wanted a directory; got the file a.file"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.file").touch()
    assert main(["experiment", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_all_on_a_foreign_model_names_what_it_leaves_out(tmp_path: Path) -> None:
    names = {n for n in experiments.NAMES if experiments.get_experiment(n).models == "any"}
    rest = set(experiments.NAMES) - names
    own = {"stability", "theorems", "confound", "masks", "centring", "positions", "language"}
    assert rest == {"accuracy"} | own
    assert running.fitting(ACCURACY, [NOBODY]) == ()
