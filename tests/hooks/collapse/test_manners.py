"""The probe leaves the model as it was found, in whatever mode it is called."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import models
from tests.support.marks import slowly
from tests.support.probes import SIGMAS, assert_frames, assert_same_numbers, ids, probe
from tests.support.watching import (
    Found,
    attn,
)


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


@pytest.mark.parametrize("name", ["gpt2", "llama", *slowly("bloom", "qwen3")])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_runs_under_inference_mode(dtype: torch.dtype) -> None:
    built = models.tiny_gpt2().to(dtype)
    plain = probe(built)
    with torch.inference_mode():
        again = probe(built)
    assert plain.n_sparse > 50
    for name in ("rows", "loose", "strict"):
        assert np.array_equal(getattr(plain, name), getattr(again, name)), name


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
