"""Every public call and command refuses wrong arguments by name: ``name: wanted X; got Y``.

`tests.support.argument_calls` has the calls, `tests.support.arguments` the values and the rule.
Each argument of a call is replaced by each value; the short form tries some of the pairs of every
argument.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hooks
import qkvnorm_lens
from hooks import arguments
from qkvnorm_lens import experiments, plots
from qkvnorm_lens.training import addition, recipes
from tests.support import argument_calls, models
from tests.support.arguments import POOL, Call, outcome
from tests.support.watching import shape_checks_off

SHORT = 9  # values for each argument in the short form


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Call]]:
    folder = tmp_path_factory.mktemp("arguments")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield argument_calls.every(models.tiny_gpt2(), folder)


def _plainly(value: Any) -> bool:
    """Whether settings are Python's own values, whose text is theirs alone."""
    if isinstance(value, tuple):
        return all(map(_plainly, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_plainly(getattr(value, f.name)) for f in dataclasses.fields(value))
    return value is None or type(value) in (bool, int, float, str)


def _misses(call: Call, argument: str, values: list[str]) -> list[str]:
    found = []
    for value in values:
        kind, said = outcome(call, argument, value)
        if kind == "result":
            kept = getattr(said, "settings", said)
            named = type(kept).__name__
            settings = named.endswith("Settings") or named in ("NormNoise", "CentredAttention")
            if settings and not _plainly(kept):
                found.append(f"{argument}={value}: kept as {kept!r}")
        elif kind != "refused":
            found.append(f"{argument}={value}: {kind}: {said}")
    return found


@pytest.mark.parametrize("name", argument_calls.NAMES)
def test_wrong_arguments_are_refused_by_name(calls: dict[str, Call], name: str) -> None:
    call, found = calls[name], []
    rng = random.Random(name)
    for argument in call.arguments():
        values = call.values(argument)
        found += _misses(call, argument, rng.sample(values, min(SHORT, len(values))))
    assert not found


@pytest.mark.long
@pytest.mark.parametrize("name", argument_calls.NAMES)
def test_every_value_of_every_argument(calls: dict[str, Call], name: str) -> None:
    call = calls[name]
    found = [m for a in call.arguments() for m in _misses(call, a, call.values(a))]
    assert not found


def test_the_calls_are_all_that_are_public(calls: dict[str, Call]) -> None:
    """A public function that is new must be tried, too."""
    results = {"RowTable", "KeptRows", "ScoreParts", "AttentionSites", "LayerSites", "Site"}
    results |= {"VectorSite", "UnsupportedModelError", "ReportFileError"} | {
        name for name in hooks.__all__ if name.endswith("Report")
    }
    results |= {"LayerView", "Prompts", "Law", "Uniform", "Gaussian", "LogNormal", "CacheRisk"}
    results |= {"CacheRecipe", "CacheFormat", "CacheSettings"}
    given = {"attention_sites", "encode"}  # an argument of its own: what the model is given
    for module in (hooks, qkvnorm_lens, plots):
        for name in module.__all__:
            if callable(getattr(module, name)) and name not in results | given:
                assert {name, f"plots.{name}"} & set(calls), name


# -- which values are taken -----------------------------------------------------------------------


COUNTS = {"0", "1", "2", "99", "np.int64", "array()", "tensor()"}
ANSWERS = {"True", "False", "np.bool_"}
TAKEN: Mapping[tuple[str, str], set[str]] = {
    ("NormNoise", "sigma"): {"0", "0.5", "Fraction", "np.float32", "array(0.25)", "tensor(0.25)"},
    ("NormNoise", "seed"): COUNTS | {"2**70"},
    ("NormNoise", "layers"): {"None", "[0]", "long list", "tuple", "range", "generator", "set"}
    | {"array[2]"},
    ("CollapseReport.fragile", "n"): COUNTS,
    ("CollapseReport.fragile", "content"): ANSWERS,
    ("SpreadReport.to_frame", "share"): {"1", "0.5", "Fraction", "np.float32", "array(0.25)"}
    | {"tensor(0.25)"},
    ("RankReport.to_frame", "without_first"): ANSWERS,
    ("Recursion", "skip"): ANSWERS,
    ("dynamics.causal_mask", "n"): COUNTS - {"0"},
    ("KeptRows.weights", "row"): COUNTS - {"99"},
    ("get_recipe", "recipe"): set(),
    ("Recipe", "batch_size"): COUNTS - {"0"},
}


@pytest.mark.parametrize(("name", "argument"), TAKEN)
def test_numbers_are_taken_in_every_form(calls: dict[str, Call], name: str, argument: str) -> None:
    """And nothing else: a truth value is no number, and a number no truth value."""
    call = calls[name]
    taken = {v for v in call.values(argument) if outcome(call, argument, v)[0] == "result"}
    assert taken == TAKEN[name, argument]


@pytest.mark.parametrize("seven", [7, np.int32(7), np.array(7), torch.tensor(7)])
@pytest.mark.parametrize("quarter", [0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25)])
def test_what_is_kept_are_pythons_own_numbers(seven: Any, quarter: Any) -> None:
    """So that noise is equal to noise, and goes into JSON and a hash."""
    with shape_checks_off():
        noise = hooks.NormNoise(sigma=quarter, seed=seven, layers=(seven,))
    assert noise == hooks.NormNoise(sigma=0.25, seed=7, layers=(7,))
    assert hash(noise) == hash(hooks.NormNoise(sigma=0.25, seed=7, layers=(7,)))
    assert repr(noise) == repr(hooks.NormNoise(sigma=0.25, seed=7, layers=(7,)))


def test_a_generator_is_read_once_and_whole() -> None:
    model, ids = models.tiny_gpt2(), torch.tensor([[1, 2, 3, 4, 5, 6]])
    for call, name, values in (
        (hooks.collapse_probe, "sigmas", [0.1, 0.2, 0.4]),
        (hooks.collapse_probe, "layers", [0, 1]),
        (hooks.sweep, "sigmas", [0.1, 0.4]),
        (hooks.spectral_gap, "lengths", [3, 5]),
        (hooks.interference, "constants", [0.5, 1.0]),
        (hooks.symmetry_gap, "permutations", [[1, 0, 2, 3, 4, 5], [2, 1, 0, 3, 4, 5]]),
        (hooks.rank_profile, "layers", [0, 1]),
    ):
        with shape_checks_off():
            reports = [call(model, ids, **{name: form}) for form in (values, iter(values))]
        assert reports[0].settings == reports[1].settings
        pd.testing.assert_frame_equal(*(report.to_frame() for report in reports))


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "options", "meant"),
    [
        (hooks.NormNoise, {"sigma": 0.1, "law": "unifrom"}, "uniform"),
        (hooks.NormNoise, {"sigma": 0.1, "law": "Gaussian"}, "gaussian"),
        (hooks.NormNoise, {"sigma": 0.1, "shared": "head"}, "heads"),
        (hooks.NormNoise, {"sigma": 0.1, "rows": "nonsparse"}, "non-sparse"),
        (hooks.NormNoise, {"sigma": 0.1, "at": "projections"}, "projection"),
        (qkvnorm_lens.NormSpec, {"kind": "rsm"}, "rms"),
        (qkvnorm_lens.named_config, {"name": "smal", "placement": "pre"}, "small"),
        (qkvnorm_lens.load_checkpoint, {"name": "addition_pre"}, "addition-pre"),
        (qkvnorm_lens.load_model, {"name": "./addition-pre"}, "addition-pre"),
        (addition.get_split, {"split": "small_train"}, "small-train"),
        (recipes.get_recipe, {"recipe": "modren"}, "modern"),
        (experiments.get_experiment, {"name": "colapse"}, "collapse"),
    ],
)
def test_a_name_that_is_near_is_suggested(call: Any, options: Any, meant: str) -> None:
    with shape_checks_off(), pytest.raises(ValueError, match=r"wanted .*; got ") as refused:
        call(**options)
    assert str(refused.value).endswith(f"(did you mean {meant!r}?)")


def test_a_name_far_from_all_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"; got 'cauchy'$"):
        hooks.NormNoise(sigma=0.1, law="cauchy")


def test_a_long_value_is_not_printed_whole() -> None:
    for value in (list(range(10_000)), "x\n" * 10_000, 10**6000, {1: "y" * 999}):
        said = arguments.brief(value)
        assert len(said) <= 130
        assert "\n" not in said


# -- figures of wrong things ----------------------------------------------------------------------


def test_figures_of_wrong_tables_and_axes(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    axes = list(Figure().subplots(1, 3))
    log = pd.DataFrame({"sequences": [1], "loss": [2.0], "per_token": [0.5]})
    (tmp_path / "log.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.csv").write_text("")
    report = hooks.collapse_probe(
        models.tiny_gpt2(), [[1, 2, 3, 4, 5, 6, 7, 8]], sigmas=[0.3], draws=0
    )
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (plots.training_curves, {"logs": {"a": log.assign(loss="much")}}, "logs"),
        (plots.training_curves, {"logs": {"a": log.drop(columns="loss")}}, "logs"),
        (plots.training_curves, {"logs": {"a": tmp_path / "none.csv"}}, "logs"),
        (plots.training_curves, {"logs": {"a": tmp_path}}, "logs"),
        (plots.training_curves, {"logs": {"a": tmp_path / "log.csv"}}, "logs"),
        (plots.training_curves, {"logs": {"a": tmp_path / "empty.csv"}}, "logs"),
        (plots.training_curves, {"logs": {"a": 3}}, "logs"),
        (plots.training_curves, {"logs": {"a": log}, "ax": axes}, "ax"),
        (plots.sparsity_histogram, {"table": pd.DataFrame({"low": ["a"], "rows": [1]})}, "table"),
        (plots.sparsity_histogram, {"table": pd.DataFrame({"low": [], "rows": []})}, "table"),
        (plots.rank_by_depth, {"reports": {1: report}}, "reports"),
        (plots.rank_by_depth, {"reports": [report]}, "reports"),
        (plots.rank_by_depth, {"reports": pd.DataFrame({"label": ["L0"]})}, "reports"),
        (plots.spectrum_by_depth, {"reports": pd.DataFrame({"layer": [0]})}, "reports"),
        (plots.collapse_curve, {"report": report, "ax": axes}, "ax"),
        (plots.collapse_curve, {"report": report, "ax": "axis"}, "ax"),
        (plots.head_map, {"report": report, "ax": np.array([None])}, "ax"),
        (plots.head_map, {"report": report, "ax": axes[0], "backend": "plotly"}, "ax"),
        (plots.head_map, {"report": report, "backend": "plotlib"}, "backend"),
        (plots.attention_rows, {"report": report, "ax": []}, "ax"),
    ]
    for call, options, name in wrong:
        with shape_checks_off(), pytest.raises((ValueError, TypeError, OSError)) as refused:
            call(**options)
        assert re.match(rf"{name}: .*wanted .*; got ", str(refused.value))


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    view = plots.View("<p>")
    for path in (tmp_path, tmp_path / "file" / "page.html"):
        with pytest.raises(OSError, match=r"^path: wanted a file that can be written; got "):
            view.save(path)


def test_every_argument_of_a_call_is_tried(calls: dict[str, Call]) -> None:
    tried = sum(len(c.arguments()) * len(POOL) for c in calls.values())
    assert tried > 10_000
    for name, call in calls.items():
        known = set(inspect.signature(call.call).parameters)
        assert {*call.right, *call.names, *call.slow} <= known, name
    names = list(itertools.chain.from_iterable(c.arguments() for c in calls.values()))
    assert len(set(names)) > 100
