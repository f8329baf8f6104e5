"""hooks.symmetry_gap: what is invariant to permutations by construction is measured to be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import hooks
from hooks import SymmetryReport, UnsupportedModelError
from tests.support import models
from tests.support.symmetry import (
    EXACT,
    GPT2,
    KINDS,
    LENGTH,
    NAMES,
    SIZED,
    TWO,
    backwards,
    gap,
    ids,
)
from tests.support.watching import Found, shape_checks_off


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]().double()


# -- the verdict ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_called_no_gap(dtype: torch.dtype) -> None:
    """What float32 sees, bfloat16 may leave undecided, but not deny."""
    prompts = models.tokens(2, 12)
    exact = hooks.symmetry_gap(models.tiny_llama(), prompts, progress=False)
    half = hooks.symmetry_gap(models.tiny_llama().to(dtype), prompts, progress=False)
    for variant in NAMES[:3]:
        assert exact.verdict(variant) == "gap"
        assert half.verdict(variant) in ("gap", "undecided")
        assert not half.vanishes(variant)
    assert exact.verdict("both removed") == "none"
    assert half.verdict("both removed") in ("none", "undecided")


def judged(
    report: SymmetryReport, gaps: list[float], floors: list[float], tv: float, blur: float
) -> str:
    """The verdict where prompts' logits move by ``gaps``, and by ``floors`` for rounding."""

    def of(array: np.ndarray, values: Any) -> np.ndarray:
        full = np.zeros_like(array[:, : len(gaps)])
        return full + np.asarray(values).reshape(1, -1, *[1] * (array.ndim - 2))

    known = {name: of(getattr(report, name), gaps) for name in ("logits",)}
    known |= {name: of(getattr(report, name), [tv] * len(gaps)) for name in ("tv", "stream")}
    known["floor_logits"] = of(report.floor_logits, floors)
    for name in ("floor_tv", "floor_stream"):
        known[name] = of(getattr(report, name), [blur] * len(gaps))
    other = replace(report, **known)
    assert other.to_frame()["verdict"].iloc[0] == other.verdict("as is")
    assert other.vanishes("as is") == (other.verdict("as is") == "none")
    assert ("undecided: rounding too large" in str(other)) == (
        other.verdict("as is") == "undecided"
    )
    assert ("no gap (" in str(other)) == other.vanishes("as is")
    return other.verdict("as is")


@functools.cache
def measured() -> SymmetryReport:
    with shape_checks_off():
        return gap(GPT2, positions=True, mask=True)


@settings(max_examples=30)
@given(n=st.integers(3, 6), floor=st.floats(1e-7, 1e-5), other=st.floats(0, 1e6))
def test_a_chaotic_prompt_hides_no_other(n: int, floor: float, other: float) -> None:
    """A gap of one prompt is one, however large rounding is in another."""
    with shape_checks_off():
        report = measured()
        report = replace(report, **{a: np.repeat(getattr(report, a)[:, :1], n, 1) for a in SIZED})
        gaps = [100 * floor, other, *[floor] * (n - 2)]
        assert judged(report, gaps, [floor, max(other, floor), *[floor] * (n - 2)], 0.5, 0.1) == (
            "gap"
        )


def test_the_verdict_is_as_defined() -> None:
    with shape_checks_off():
        report = measured()
        assert judged(report, [10.1, 1], [1, 1], 0.5, 0.3) == "gap"
        assert judged(report, [9.9, 1], [1, 1], 0.5, 0.3) == "undecided"
        assert judged(report, [9.9, 1], [1, 1], 0.5, 1e-4) == "none"  # rounding is small
        assert judged(report, [9.9, 1], [1, 1], 1e-4, 0.3) == "none"  # and so is the change
        # Rounding did little to one prompt: it is compared with what it does to most.
        assert judged(report, [5e-3, 1e-3], [1e-5, 1e-3], 1e-5, 1e-5) == "none"


def test_without_positions_and_mask_nothing_is_left(model: Any) -> None:
    report = gap(model)
    assert report.settings.variants == NAMES
    both = report.to_frame().set_index("variant").loc["both removed"]
    assert both["vanishes"]
    if model.cfg.architecture == "QKVNormTransformer":  # others norm in float32
        assert both["largest"] < EXACT
    assert both["largest"] < 1e-4
    assert not any(report.vanishes(v) for v in NAMES[:3])
    assert "Both removed: no gap" in report.summary()
    assert "Something else" not in report.summary()


def test_rounding_is_tried_at_every_block(model: Any) -> None:
    """The last digit of float32: it is there before the first block, and behind each."""
    report = gap(model)
    floor = report.floor_stream
    assert (floor > 1e-9).all()
    assert (floor < 1e-4).all()
    np.testing.assert_allclose(floor[..., 0], np.finfo(np.float32).eps, rtol=0.2)


# -- draws, batches, prompts ----------------------------------------------------------------------


@pytest.mark.parametrize("keep_first", [False, True])
def test_permutations_keep_the_last_and_are_none_the_identity(keep_first: bool) -> None:
    report = gap(TWO["pre"], permutations=40, keep_first=keep_first)
    for order in report.orders:
        assert order.shape == (40, LENGTH)
        assert (np.sort(order, axis=1) == np.arange(LENGTH)).all()
        assert (order[:, -1] == LENGTH - 1).all()
        assert (order != np.arange(LENGTH)).any(axis=1).all()
        assert (order[:, 0] == 0).all() == keep_first
    assert not np.array_equal(*report.orders)


def test_batches_and_other_prompts_do_not_matter(gpt2: Any) -> None:
    prompts = [ids[0].tolist(), ids[1, :6].tolist(), ids[1].tolist()]
    one = hooks.symmetry_gap(gpt2, prompts, batch_size=1, progress=False)
    other = hooks.symmetry_gap(gpt2, prompts, batch_size=64, progress=False)
    first = hooks.symmetry_gap(gpt2, prompts[:1], progress=False)
    padded = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for i, (prompt, at) in enumerate(zip(prompts, (0, 3, 3), strict=True)):
        padded[i, at : at + len(prompt)] = torch.tensor(prompt)
        mask[i, at : at + len(prompt)] = 1
    third = hooks.symmetry_gap(gpt2, padded, attention_mask=mask, progress=False)
    a = one.to_frame("permutation")
    for later in (other, third):
        b = later.to_frame("permutation")
        pd.testing.assert_frame_equal(a, b, rtol=1e-3, atol=1e-4)
        assert all(np.array_equal(x, y) for x, y in zip(one.orders, later.orders, strict=True))
    mine = a[a["prompt"] == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(first.to_frame("permutation"), mine, rtol=1e-3, atol=1e-4)


def test_two_tokens_to_swap_are_needed(gpt2: Any) -> None:
    for n, keep in ((2, False), (3, True)):
        with pytest.raises(ValueError, match=r"prompt 0: wanted at least . tokens .*got " + str(n)):
            hooks.symmetry_gap(gpt2, ids[:1, :n], keep_first=keep, progress=False)
    report = hooks.symmetry_gap(gpt2, ids[:1, :3], permutations=2, progress=False)
    assert report.orders[0].tolist() == [[1, 0, 2]] * 2  # there is no other
    assert report.to_frame("layer")["nearer"].isna().all()


def test_layers_are_looked_at_alone(gpt2: Any) -> None:
    whole, second = gap(gpt2), gap(gpt2, layers=[1])
    np.testing.assert_allclose(second.stream[..., 1][..., :3], whole.stream[..., 2][..., :3],
                               rtol=1e-3, atol=1e-5)  # fmt: skip
    assert second.to_frame("layer")["layer"].tolist() == [-1, 1] * 4


# -- the report -----------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(model: Any, tmp_path: Path) -> None:
    report = gap(model, layers=[1], keep_first=True)
    again = SymmetryReport.load(report.save(tmp_path / "deep" / "symmetry.safetensors"))
    assert again.settings == report.settings
    assert again.tokens == report.tokens
    assert again.summary() == report.summary()
    assert all(np.array_equal(a, b) for a, b in zip(again.orders, report.orders, strict=True))
    for by in ("variant", "layer", "permutation", "distance"):
        pd.testing.assert_frame_equal(again.to_frame(by), report.to_frame(by), check_exact=True)


def test_frames_are_means_of_the_permutations(gpt2: Any) -> None:
    report = gap(gpt2)
    means = report.to_frame("permutation").groupby("variant", sort=False)
    frame = report.to_frame().set_index("variant")
    for name in ("kl", "tv", "logits", "moved", "stream"):
        np.testing.assert_allclose(frame[name], means[name].mean(), rtol=1e-12)
    np.testing.assert_allclose(frame["largest"], means["logits"].max())
    assert (frame["tv"] <= np.sqrt(frame["kl"] / 2) + 1e-12).all()  # Pinsker's inequality


def test_another_file_and_other_names_are_refused(gpt2: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="wanted a symmetry report"):
        SymmetryReport.load(wrong)
    report = gap(gpt2, positions=True)
    with pytest.raises(ValueError, match="variant: wanted one of"):
        report.vanishes("both removed")
    with shape_checks_off(), pytest.raises(ValueError, match="by: wanted one of"):
        report.to_frame("head")


# -- what is left alone, and what is refused --------------------------------------------------


def test_the_model_is_left_as_it_was_found() -> None:
    bridge = models.tiny_llama()
    bridge(ids)  # the first pass sets a bridge up
    bridge.train()
    with shape_checks_off():
        before = Found(bridge)
        gap(bridge)
        before.assert_same(Found(bridge))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"permutations": 0}, "permutations: wanted an integer >= 1"),
        ({"permutations": 1.5}, "permutations: wanted an integer >= 1"),
        ({"permutations": True}, "permutations: wanted an integer >= 1"),
        ({"permutations": []}, "permutations: wanted one or more"),
        ({"permutations": "ab"}, "permutations: wanted an integer >= 1, or permutations"),
        ({"permutations": {1, 2}}, "permutations: wanted an integer >= 1, or permutations"),
        ({"permutations": np.arange(LENGTH)}, "permutations: wanted each to be a list of integers"),
        ({"permutations": [[0.0, 1.0]]}, "permutations: wanted each to be a list of integers"),
        ({"permutations": [[0, [1]]]}, "permutations: wanted each to be a list of integers"),
        ({"permutations": [[1, 0, 2]]}, "permutations: wanted each to hold"),
        ({"permutations": [list(range(LENGTH))[::-1]]}, "permutations: wanted each to hold"),
        ({"permutations": [backwards(LENGTH)], "keep_first": True}, "and the first in its place"),
        ({"positions": "kept"}, "positions: wanted True, False or None"),
        ({"mask": 1}, "mask: wanted True, False or None"),
        ({"keep_first": None}, "keep_first: wanted True or False"),
        ({"layers": [7]}, "layers: wanted one of the attention layers"),
        ({"batch_size": 0}, "batch_size: wanted an integer >= 1"),
        ({"seed": -1}, "seed: wanted an integer >= 0"),
    ],
)
def test_wrong_options_are_refused(gpt2: Any, options: dict[str, Any], message: str) -> None:
    with shape_checks_off(), pytest.raises((ValueError, TypeError), match=message):
        gap(gpt2, **options)


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of a classifier": lambda x: x[:, -1],
    "of one position, summed": lambda x: x.sum(1),
    "one number": lambda x: x.mean(),
    "with a further axis": lambda x: x[:, :, None],
    "of the whole batch": lambda x: x.flatten(0, 1),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_without_logits_of_each_position_is_refused(gpt2: Any, name: str) -> None:
    """What the last position predicts is what is compared: a classifier's output is another."""

    def other(x: Tensor, hook: Any) -> Tensor:
        return OUTPUTS[name](x)

    hooks.attention_sites(gpt2)
    with (
        gpt2.hooks(fwd_hooks=[("unembed.hook_out", other)]),
        pytest.raises(UnsupportedModelError, match="logits to compare: wanted a tensor"),
    ):
        gap(gpt2)


@pytest.mark.parametrize(
    ("at", "message"),
    [("blocks.1.hook_out", "layer 1: symmetry gap"), ("unembed.hook_out", "logits")],
)
def test_what_is_no_number_is_refused(gpt2: Any, at: str, message: str) -> None:
    def spoil(x: Tensor, hook: Any) -> Tensor:
        return torch.where(torch.arange(x.shape[-1]) == 3, torch.nan, x)

    hooks.attention_sites(gpt2)
    with (
        gpt2.hooks(fwd_hooks=[(at, spoil)]),
        pytest.raises(UnsupportedModelError, match=message),
    ):
        gap(gpt2)
