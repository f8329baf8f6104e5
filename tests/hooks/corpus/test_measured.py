"""Sweeps, spreads and interference of a corpus: one call's numbers, in constant size, any split."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hooks
from hooks import measure_corpus, merge_corpus
from hooks.corpus import Stopped, cut
from tests.support.watching import shape_checks_off

CORPUS: dict[str, Any] = {"context": 24, "progress": False}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sweep": (hooks.sweep, {"sigmas": [0.05, 0.2], "replicates": 3}),
    "spread": (hooks.spread, {"of": "k"}),
    "stream": (hooks.spread, {}),
    "interference": (hooks.interference, {"draws": 2, "output": True}),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: Any) -> tuple[Any, dict[str, Any]]:
    return CASES[request.param]


@pytest.fixture(scope="module")
def few(texts: list[str]) -> list[str]:
    return texts[:24]


@pytest.fixture(scope="module")
def whole(model: Any, few: list[str], case: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "BLOCK_TOKENS", 100)
        patch.setattr(cut, "CHARACTERS", 1)
        return measure_corpus(model, few, case[0], **case[1], **CORPUS)


@pytest.fixture(autouse=True)
def smaller_groups(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "CHARACTERS", 1)


def rows(model: Any, texts: list[str]) -> list[list[int]]:
    """Windows in the corpus's order."""
    found = cut.Cut(model, texts, context=24, batch_size=8, most=None, prepend_bos=None)
    return [window.ids for block in found.blocks() for window in block.windows]


def frames(report: Any) -> Iterator[pd.DataFrame]:
    kinds = ("sigma", "draw") if isinstance(report, hooks.SweepReport) else ("head", "model")
    yield from (report.to_frame(by) for by in kinds)


def equal(a: Any, b: Any, rtol: float) -> None:
    """All that two pooled reports hold."""
    assert a.settings == b.settings
    assert a.tokens == b.tokens
    for name, mine in vars(a).items():
        theirs = getattr(b, name)
        pairs = [(mine, theirs)] if isinstance(mine, np.ndarray) else []
        if isinstance(mine, tuple) and mine and isinstance(mine[0], np.ndarray):
            pairs = list(zip(mine, theirs, strict=True))
        for x, y in pairs:
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol, err_msg=name)


def test_a_pooled_report_says_what_the_whole_one_says(
    model: Any, few: list[str], case: Any
) -> None:
    """All rates and standard errors, also after a merge; a spread up to its grid."""
    measure, options = case
    each = measure(model, rows(model, few), progress=False, **options)
    exact = measure is not hooks.spread
    for mine, theirs in zip(frames(each.pooled()), frames(each), strict=True):
        pd.testing.assert_frame_equal(
            mine, theirs, rtol=1e-9 if exact else 3e-4, atol=1e-9 if exact else 6e-4
        )
    if exact:
        assert each.pooled().summary() == each.summary()
    assert each.pooled().pooled() is not each
    of_one = {hooks.sweep: "prompt", hooks.spread: "token"}.get(measure)
    if of_one:
        with pytest.raises(ValueError, match="by: wanted"):
            each.pooled().to_frame(of_one)


def test_a_corpus_is_the_measure_of_its_windows(
    model: Any, few: list[str], case: Any, whole: Any
) -> None:
    """What noise draws apart: windows of a corpus have numbers of their own there."""
    measure, options = case
    if "sigmas" in options:
        quiet = {"sigmas": [1e-9], "replicates": 1}
        got, options = measure_corpus(model, few, measure, **quiet, **CORPUS), quiet
    else:
        got = whole
    once = measure(model, rows(model, few), progress=False, **options).pooled()
    for mine, theirs in zip(frames(got), frames(once), strict=True):
        drawn = [c for c in theirs if c.startswith("permuted")]
        pd.testing.assert_frame_equal(
            mine.drop(columns=drawn), theirs.drop(columns=drawn), rtol=1e-3, atol=1e-5
        )
    assert len(got.tokens) == len(rows(model, few))


@pytest.mark.parametrize("n", [2, 3, 9])
def test_any_split_gives_the_report_of_one(
    model: Any, few: list[str], case: Any, whole: Any, n: int, tmp_path: Path
) -> None:
    for i in range(1, n + 1):
        measure_corpus(model, few, case[0], shard=(i, n), out=tmp_path, **case[1], **CORPUS)
    merged = merge_corpus(tmp_path)
    equal(merged, whole, 1e-12)
    assert merged.model == whole.model
    assert merged.summary() == whole.summary()
    (tmp_path / "saved").mkdir()
    again = type(merged).load(merged.save(tmp_path / "saved" / "report.safetensors"))
    equal(again, merged, 0)


class Stopping(list[str]):
    """Texts, at one of which the process is asked to stop."""

    at = -1

    def __iter__(self) -> Iterator[str]:
        for number, text in enumerate(list.__iter__(self)):
            if number == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield text


def test_a_stopped_run_goes_on_to_the_same_bits(
    model: Any, few: list[str], case: Any, whole: Any, tmp_path: Path
) -> None:
    for at in (6, 17):
        stopping = Stopping(few)
        stopping.at = at
        with pytest.raises(Stopped):
            measure_corpus(
                model, stopping, case[0], out=tmp_path, save_every=1e-9, **case[1], **CORPUS
            )
    equal(measure_corpus(model, few, case[0], out=tmp_path, **case[1], **CORPUS), whole, 0)


def test_a_report_does_not_grow(model: Any, few: list[str], case: Any, whole: Any) -> None:
    many = measure_corpus(model, few * 3, case[0], **case[1], **CORPUS)
    assert len(many.tokens) == 3 * len(whole.tokens)
    for name, array in vars(whole).items():
        if isinstance(array, np.ndarray):
            assert getattr(many, name).shape == array.shape, name
        elif isinstance(array, tuple) and array and isinstance(array[0], np.ndarray):
            assert [x.shape for x in getattr(many, name)] == [x.shape for x in array], name


def test_packed_documents_give_what_they_give_alone(
    model: Any, few: list[str], case: Any, whole: Any
) -> None:
    measure, options = case
    if measure is hooks.interference:
        with pytest.raises(ValueError, match=r"pack: wanted False with hooks\.interference"):
            measure_corpus(model, few, measure, pack=True, **options, **CORPUS)
        return
    if "sigmas" in options:
        options = {"sigmas": [1e-9], "replicates": 1}
    alone, packed = (
        measure_corpus(model, few, measure, pack=pack, **options, **CORPUS)
        for pack in (False, True)
    )
    assert len(packed.tokens) < len(alone.tokens)
    for mine, theirs in zip(frames(packed), frames(alone), strict=True):
        apart = [c for c in theirs if c.startswith("se_prompts")]
        pd.testing.assert_frame_equal(
            mine.drop(columns=apart), theirs.drop(columns=apart), rtol=2e-3, atol=1e-5
        )


def test_another_measure_and_other_options_are_refused(
    model: Any, few: list[str], tmp_path: Path
) -> None:
    options = {"sigmas": [0.1], "replicates": 1}
    measure_corpus(model, few, hooks.sweep, out=tmp_path, **options, **CORPUS)
    for measure, other, said in (
        (hooks.sweep, {"sigmas": [0.2], "replicates": 1}, r"got options .*0\.2"),
        (hooks.spread, {}, "got measure 'spread' instead of 'sweep'"),
    ):
        with pytest.raises(ValueError, match=f"out: wanted another directory.*{said}"):
            measure_corpus(model, few, measure, out=tmp_path, **other, **CORPUS)
    with pytest.raises(ValueError, match="got measure 'collapse_probe' instead of 'sweep'"):
        hooks.probe_corpus(model, few, out=tmp_path, **CORPUS)
    with shape_checks_off(), pytest.raises(TypeError, match=r"measure: wanted hooks\.sweep"):
        measure_corpus(model, few, hooks.collapse_probe, **CORPUS)
    for option in ("targets", "sigma"):
        with pytest.raises(TypeError, match=f"options: wanted some of .*; got '{option}'"):
            measure_corpus(model, few, hooks.sweep, **{option: [1]}, **CORPUS)
