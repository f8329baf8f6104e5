"""Interference runs a block again in place of a pass: the same numbers, or whole passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hooks import InterferenceReport, NormNoise, attention_sites
from hooks.model.inputs import ModelInput
from tests.hooks.measures.test_interference_by_hand import by_hand, counted
from tests.support import builders, models
from tests.support.interference import KINDS, ids, measure


@contextmanager
def passes() -> Iterator[list[int]]:
    """How many positions each whole pass has had."""
    seen: list[int] = []
    run = ModelInput.run

    def counted_run(given: ModelInput, model: Any) -> Any:
        seen.append(given.first.shape[-1])
        return run(given, model)

    with mock.patch.object(ModelInput, "run", counted_run):
        yield seen


def watched(model: Any) -> Any:
    """The model with a hook in each block that only looks, as a user may have one there."""
    for block in {sites.block for sites in attention_sites(model)}:
        name = next(n for n in model.hook_dict if n.startswith(f"{block}.") and "hook_out" in n)
        model.add_hook(name, lambda tensor, hook: None)
    return model


def equal(a: InterferenceReport, b: InterferenceReport) -> None:
    """Equal counts; sums up to the rounding of two runs of one pass."""
    assert a.settings == b.settings
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray) and x.dtype.kind == "i":
            np.testing.assert_array_equal(x, y, err_msg=f.name)
        elif isinstance(x, np.ndarray):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=f.name)


def runs(model: Any) -> list[int]:
    """Positions of each whole pass of one measurement."""
    with passes() as seen:
        measure(model, sparse=0.6)
    return seen


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "spare_first": {"spare_first": True},
    "constants": {"constants": [0.5, 2.0]},
    "k": {"on": "k"},
    "qk": {"on": "qk", "layers": [1]},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_a_block_run_again_gives_what_a_pass_gives(name: str, options: str) -> None:
    model, given = KINDS[name](), {"sparse": 0.6, **OPTIONS[options]}
    short = measure(model, **given)
    assert short.rows.sum() >= 10
    equal(short, measure(watched(model), **given))


# Parallel blocks, ALiBi, a table of relative positions, multi-query attention, a sink, a soft cap,
# experts, latent attention, an encoder beside the decoder, and caches that no option turns off.
FAMILIES = (
    "GPTJForCausalLM", "GPTNeoXForCausalLM", "CohereForCausalLM", "MptForCausalLM",
    "T5ForConditionalGeneration", "GPTBigCodeForCausalLM", "GptOssForCausalLM",
    "Gemma2ForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "GraniteMoeForCausalLM",
    "OPTForCausalLM",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_so_it_does_in_every_family(name: str, unchecked: None) -> None:
    built = builders.build(name)
    args, kwargs = built.inputs(batch=2, pos=24)
    given = dict(zip(("input_ids",), args, strict=False)) | kwargs
    own = [s.layer for s in attention_sites(built.model) if s.sequence("q") == s.sequence("k")]
    options: dict[str, Any] = {"sparse": 0.4, "layers": own}
    measure(built.model, given, **options)
    with passes() as seen:
        short = measure(built.model, given, **options)
    assert len(seen) == 1
    assert short.rows.sum() >= 10
    equal(short, measure(watched(built.model), given, **options))


def test_one_pass_serves_all_layers_and_a_hook_in_a_block_brings_whole_ones_back() -> None:
    model = KINDS["llama"]()
    first = runs(model)  # self-check and norms, on few tokens
    assert len(first) > 1
    assert first.count(24) == 1
    assert runs(model) == [24]
    model.add_hook("unembed.hook_out", lambda tensor, hook: None)  # beyond every block
    runs(model)
    assert runs(model) == [24]
    handle = model.blocks[1].attn.register_forward_hook(lambda module, args, out: None)
    runs(model)
    assert runs(model) == [24] * 3  # its two ways to freeze
    handle.remove()
    runs(watched(model))
    assert runs(model) == [24] * 5


def test_the_norms_of_a_changed_model_are_looked_at_anew() -> None:
    model = KINDS["llama"]()
    runs(model)
    with torch.no_grad():
        model.blocks[0].ln1.original_component.weight.mul_(2)
    attention_sites(model)
    again = runs(model)
    assert len(again) > 1
    assert runs(model) == [24]


def test_noise_in_a_block_brings_whole_passes() -> None:
    model = KINDS["llama"]()
    runs(model)
    with NormNoise(sigma=0.05).applied(model):
        assert runs(model) == [24] * 5
    assert runs(model) == [24]


@pytest.mark.parametrize("on", ["k", "qk"])
def test_a_hook_between_norm_and_scores_counts(on: str) -> None:
    model = KINDS["llama"]()
    measure(model)

    def turned(q: torch.Tensor, hook: Any) -> torch.Tensor:
        return q.roll(1, -1)

    model.add_hook("blocks.1.attn.q.hook_out", turned)
    report = measure(model, on=[on], sparse=0.6)
    least, most = counted(*by_hand(model, 1, 1.0, q_clean=on == "k"), 1, 0.6)["loose"]
    assert least.sum() >= 10
    assert (least <= report.loose[0, 0, 1]).all()
    assert (report.loose[0, 0, 1] <= most).all()


def test_a_block_that_reads_more_than_its_call_is_not_run_alone() -> None:
    """The first block adds what the embedding says; the second block says something else."""
    model = KINDS["llama"]()
    said = {"by": 1.0}
    first, second = (model.blocks[i].original_component for i in range(2))
    forward, after = first.forward, second.forward

    def reads(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(x + said["by"] * torch.linspace(0, 1, x.shape[1])[:, None], *args, **kwargs)

    def says(*args: Any, **kwargs: Any) -> Any:
        said["by"] = 30.0
        return after(*args, **kwargs)

    def resets(tensor: torch.Tensor, hook: Any) -> None:
        said["by"] = 1.0

    first.forward, second.forward = reads, says
    model.add_hook("embed.hook_out", resets)
    runs(model)
    assert runs(model) == [24] * 3
    report = measure(model, sparse=0.6)
    equal(report, measure(watched(model), sparse=0.6))
    assert report.loose[:, :, 0].sum() >= 10


def test_a_log_shows_each_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hooks import interference
    from hooks.model import progress

    interference(models.tiny_llama(), ids, progress=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interference: 4 of 4 layers, ")  # each as it is, and frozen
    monkeypatch.setattr(progress, "SILENT", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    interference(models.tiny_llama(), ids)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in lines] == [1, 2, 3]
    assert all(" left" in line for line in lines)
    interference(models.tiny_llama(), ids, progress=False)
    assert not capsys.readouterr().err
    monkeypatch.undo()
    interference(models.tiny_llama(), ids)  # no terminal here
    assert not capsys.readouterr().err
