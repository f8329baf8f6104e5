"""Prompts of several lengths in one pass give what each gives alone, or do not share one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaForCausalLM

from hooks import collapse_probe
from hooks.model import ModelInput
from tests.support import models
from tests.support.probes import SIGMAS, assert_same_numbers, ids, probe
from tests.support.watching import tiny_bert

LENGTHS = [5, 24, 9, 16, 11, 9, 2, 17]
MIXED = [row[:n].tolist() for row, n in zip(models.tokens(8), LENGTHS, strict=True)]


def passes(model: Any, tokens: Any, **options: Any) -> tuple[Any, int]:
    """A second report, with everything checked, and how many forward passes it took."""
    probe(model, tokens, sigmas=SIGMAS, **options)
    return counted(model, tokens, **options)


def counted(model: Any, tokens: Any, **options: Any) -> tuple[Any, int]:
    """A report, and how many forward passes it took."""
    run, ran = ModelInput.run, []

    def noted(self: ModelInput, model: Any) -> Any:
        ran.append(self.batch)
        return run(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelInput, "run", noted)
        return probe(model, tokens, sigmas=SIGMAS, **options), len(ran)


def alone(model: Any, tokens: Any = MIXED, **options: Any) -> Any:
    return probe(model, tokens, sigmas=SIGMAS, batch_size=1, **options)


@pytest.mark.parametrize("how", [{}, {"method": "sample"}, {"engine": "torch", "draws": 0}])
def test_a_padded_pass_gives_what_each_prompt_gives_alone(model: Any, how: Any) -> None:
    if how.get("engine") and "Gemma2" in str(model.cfg.architecture):
        how = {**how, "strict": False}  # no strict rate under soft caps in torch
    together = probe(model, MIXED, sigmas=SIGMAS, **how)
    one = alone(model, **how)
    assert_same_numbers(together, one)
    assert together.n_tokens == sum(LENGTHS)
    assert not together.padding.any()
    assert together.n_sparse > 0
    places = ["prompt", "layer", "head", "query_pos", "key_pos", "jump_pos"]
    of = [x.fragile(5) for x in (together, one)]
    assert of[0][places].equals(of[1][places])


def test_few_passes_are_made() -> None:
    together, count = passes(models.tiny_llama(), MIXED)
    assert count == 2  # one would be half padding
    apart, count = passes(models.tiny_llama(), MIXED, batch_size=1)
    assert count == len(MIXED)
    assert_same_numbers(together, apart)


@given(st.lists(st.integers(2, 24), min_size=1, max_size=12), st.integers(1, 5), st.booleans())
@settings(max_examples=20, deadline=None)
def test_any_lengths_in_any_batches(lengths: list[int], batch_size: int, masked: bool) -> None:
    model = _llama()
    prompts: Any = [ids[i % 3, :n] for i, n in enumerate(lengths)]
    if masked:
        rows = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(x) for x in prompts], batch_first=True
        )
        prompts = {"input_ids": rows, "attention_mask": mask}
    assert_same_numbers(
        probe(model, prompts, sigmas=SIGMAS, batch_size=batch_size),
        alone(model, prompts),
    )


def test_a_fused_attention_in_blocks() -> None:
    model = models.tiny_llama()
    model.original_model.set_attn_implementation("sdpa")
    model.cfg.attn_implementation = "sdpa"
    assert_same_numbers(probe(model, MIXED, sigmas=SIGMAS, query_block=5), alone(model))


def test_a_model_that_sees_later_tokens_is_padded_under_its_mask_alone() -> None:
    bert = tiny_bert()
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in MIXED], batch_first=True)
    mask = (torch.arange(rows.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    _, count = passes(bert, MIXED, draws=0)
    assert count == len({*LENGTHS})
    masked, count = passes(bert, {"input_ids": rows, "attention_mask": mask}, draws=0)
    assert count == 2
    assert_same_numbers(masked, alone(bert, {"input_ids": rows, "attention_mask": mask}, draws=0))


def test_a_model_that_goes_by_the_width_of_the_batch_is_not_padded() -> None:
    """Rotary positions of two lengths; told by the longest prompt, also after shorter ones."""
    config = models.tiny_llama_config()
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }
    model = models.bridge(LlamaForCausalLM, config)
    short = [row for row in MIXED if len(row) <= 16]
    _, count = passes(model, short)
    assert count == 1
    together, count = passes(model, MIXED)
    assert count >= len({*LENGTHS})  # and another check: rotary buffers change with the length
    assert_same_numbers(together, alone(model))


def test_a_users_hook_sees_no_padding() -> None:
    model = models.tiny_llama()
    widths: list[int] = []

    def look(z: Any, hook: Any) -> None:
        widths.append(z.shape[1])

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", look)]):
        collapse_probe(model, MIXED, draws=0, progress=False)
        widths.clear()
        collapse_probe(model, MIXED, draws=0, progress=False)
    assert sorted({*widths}) == sorted({*LENGTHS})


def test_short_prompts_fill_a_pass() -> None:
    """Without ``batch_size``: 1,024 tokens, and never fewer than eight prompts."""
    model = models.tiny_llama()
    many = [ids[i % 3, : 6 + i % 5].tolist() for i in range(100)]
    found, count = passes(model, many, draws=0)
    assert count == 1
    _, count = passes(model, many, draws=0, batch_size=8)
    assert count > 10
    assert_same_numbers(found, alone(model, many, draws=0))


def test_a_trial_is_made_where_it_saves_passes() -> None:
    """A trial takes three: four lengths are not worth one, unless it was made before."""
    model = models.tiny_llama()
    few = [row[:n].tolist() for row, n in zip(models.tokens(4), (5, 9, 12, 16), strict=True)]
    apart, count = passes(model, few, draws=0)
    assert count == 4
    _, count = passes(model, MIXED, draws=0)
    assert count == 2
    together, count = passes(model, few, draws=0)
    assert count == 1
    assert_same_numbers(apart, together)


def test_what_was_found_of_shorter_prompts_says_nothing_of_longer_ones() -> None:
    model = models.tiny_llama()
    passes(model, [row[:16] for row in MIXED])
    _, first = counted(model, MIXED)
    _, again = counted(model, MIXED)
    assert first == again + 3  # a trial


@functools.cache
def _llama() -> Any:
    return models.tiny_llama()
