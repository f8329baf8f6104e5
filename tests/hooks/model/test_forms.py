"""Forms of inputs: every form of the same ids is the same prompt, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import BatchEncoding, LlamaForCausalLM, PreTrainedTokenizerFast

from hooks import UnsupportedModelError, collapse_probe, rank_profile, spectral_gap, spread, sweep
from hooks.model.encoding import encode
from tests.support import builders
from tests.support.given import (
    AT,
    IDS,
    ONES,
    B,
    N,
    probed,
    sparse_rows,
    weights,
)
from tests.support.marks import slowly
from tests.support.models import (
    bridge,
    tiny_gpt2,
    tiny_llama,
    tiny_llama_config,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)


def forms() -> dict[str, Any]:
    lists = IDS.tolist()
    return {
        "a tensor": IDS,
        "an array": IDS.numpy(),
        "lists": lists,
        "a mapping of tensors": {"input_ids": IDS},
        "a mapping of lists": {"input_ids": lists, "attention_mask": ONES.tolist()},
        "what a tokenizer returns": BatchEncoding({"input_ids": lists}),
        "with what tokenizers add": BatchEncoding(
            {"input_ids": IDS, "special_tokens_mask": ONES * 0, "length": [N] * B}
        ),
        "rows of a data set": [{"input_ids": row, "attention_mask": [1] * N} for row in lists],
        "a data set": Dataset.from_dict({"input_ids": lists, "attention_mask": ONES.tolist()}),
        "of tensors": Dataset.from_dict({"input_ids": lists}).with_format("torch"),
        "a data frame": pd.DataFrame({"input_ids": lists, "attention_mask": ONES.tolist()}),
        "with labels": {"input_ids": IDS, "labels": IDS},
        "arrays in a list": [np.asarray(row) for row in lists],
        "int32": IDS.int(),
        **{str(kind): IDS.to(kind) for kind in (torch.uint8, torch.uint16, torch.uint32)},
        "a mapping of unsigned ones": {"input_ids": IDS.to(torch.uint8), "attention_mask": ONES},
        "another byte order": IDS.numpy().astype(">i4"),
        "negative strides": IDS.flip(1).numpy()[:, ::-1],
        "objects": {"input_ids": np.array([np.asarray(row) for row in lists] + [None], object)[:B]},
        "a series in a mapping": {"input_ids": pd.Series(lists)},
        "a generator": (row for row in lists),
        "with what a call would return": {"input_ids": IDS, "logits_to_keep": torch.arange(B)},
    }


@pytest.mark.parametrize("name", forms())
def test_every_form_of_the_same_ids_is_the_same_prompt(llama: Any, plain: Any, name: str) -> None:
    assert probed(llama, forms()[name]) == sparse_rows(weights(plain, IDS))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, *slowly(torch.uint16, torch.uint32)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_kind_of_integer_can_be_padded(kind: torch.dtype, side: str) -> None:
    model = tiny_llama()
    mask = ONES.clone()
    mask[1, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    plain = collapse_probe(model, IDS, attention_mask=mask, draws=0)
    given = {
        "input_ids": IDS.to(kind),
        "attention_mask": mask.to(kind),
        "position_ids": positions.to(kind),
    }
    report = collapse_probe(model, given, draws=0)
    rows = (row for row in mask.tolist())  # any iterable is a mask
    assert collapse_probe(model, IDS, attention_mask=rows, draws=0).padding[1] == 5
    assert report.padding.tolist() == plain.padding.tolist() == [0, 5, 0, 0]
    assert np.array_equal(report.rows, plain.rows)
    floats = given | {"position_ids": positions.float()}
    assert np.array_equal(collapse_probe(model, floats, draws=0).rows, plain.rows)


def test_targets_may_be_as_ragged_as_the_tokens() -> None:
    model, lists = tiny_llama(), [row[: 24 - 3 * i].tolist() for i, row in enumerate(IDS)]
    targets = [[*row[1:], -100] for row in lists]
    wanted = sweep(model, lists, sigmas=[0.1], replicates=1)
    for given in ({"input_ids": lists}, [{"input_ids": row} for row in lists], lists):
        report = sweep(model, given, sigmas=[0.1], replicates=1, targets=targets)
        np.testing.assert_allclose(report.clean_loss, wanted.clean_loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"position_ids": AT + 100}, "inputs: wanted position_ids .*; got IndexError"),
        ({"position_ids": AT - 5}, "inputs: wanted position_ids .*; got IndexError"),
        ({"position_ids": AT * torch.nan}, "inputs: wanted position_ids .*; got RuntimeError"),
        ({"position_ids": 3}, "inputs: wanted numbers in 'position_ids'; got 3"),
        ({"position_ids": "abc"}, "inputs: wanted numbers in 'position_ids'; got 'abc'"),
        ({"token_type_ids": AT * 100}, "inputs: wanted token_type_ids .*; got IndexError"),
        (
            {"inputs_embeds": torch.ones(B, N, 32)},
            "inputs: wanted inputs_embeds .*; got ValueError",
        ),
        ({"use_cache": torch.ones(2)}, "inputs: wanted .*use_cache"),
        ({"input_ids": IDS.to_sparse()}, "wanted a dense tensor of numbers; got a sparse_coo one"),
        ({"input_ids": IDS.to("meta")}, "wanted a dense tensor of numbers; got a meta one"),
    ],
)
def test_what_the_models_own_code_refuses_is_named(named: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        collapse_probe(tiny_gpt2(), {"input_ids": IDS, **named}, draws=0)


@pytest.mark.parametrize("name", ["OPTForCausalLM", "BloomForCausalLM"])
def test_a_mask_that_a_model_does_not_take_is_named(name: str) -> None:
    mask = torch.ones(N, N).tril().bool().expand(B, 1, N, N)
    with pytest.raises(ValueError, match="inputs: wanted attention_mask that the model"):
        collapse_probe(
            builders.build(name).model, {"input_ids": IDS % 90, "attention_mask": mask}, draws=0
        )


def hiding(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Causal, ``[batch, 1, query, key]``."""
    seen = torch.ones(N, N).tril().bool()
    return torch.where(seen, 0.0, value).to(dtype).expand(B, 1, -1, -1)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_masks_of_four_axes_hide_or_are_refused(attn: str) -> None:
    """A bias among the scores is nothing that noise scales; -10000 leaves a key visible."""
    model = tiny_llama()
    model.original_model.set_attn_implementation(attn)
    wanted = collapse_probe(model, IDS, draws=0).rows
    least = torch.finfo(torch.float32).min
    for mask in (hiding(least), hiding(-1e9), hiding(-torch.inf), hiding(least) == 0):
        report = collapse_probe(model, {"input_ids": IDS, "attention_mask": mask}, draws=0)
        assert np.array_equal(report.rows, wanted)
    slope = -torch.arange(N).flip(0).float().expand(B, 1, N, N) + hiding(least)
    for mask, got in (
        (hiding(-1e4), "-10000"),
        (slope, "-"),
        (hiding(0.5), "0.5"),
        ((hiding(least) == 0).long(), "1"),
        (hiding(torch.nan), "nan"),
    ):
        words = f"attention_mask: wanted True and False, or 0 .*; got {got}"
        with pytest.raises(ValueError, match=words):
            collapse_probe(model, {"input_ids": IDS, "attention_mask": mask}, draws=0)


@pytest.mark.parametrize("call", ["probe", "sweep", "spread", "spectrum", "rank"])
@pytest.mark.parametrize(
    ("name", "attn", "added"),
    [
        ("LlamaForCausalLM", "eager", False),
        ("GPT2LMHeadModel", "eager", False),
        ("BertForMaskedLM", "sdpa", False),
        ("BertForMaskedLM", "eager", True),
        ("GPTJForCausalLM", "eager", True),
        ("GPTNeoForCausalLM", "eager", True),
    ],
)
def test_true_and_false_hide_or_are_refused(name: str, attn: str, added: bool, call: str) -> None:
    """An attention that adds its mask makes a bias of 1 of True, and hides nothing."""
    built = builders.build(name, attn=attn)
    measure = {
        "probe": lambda x: collapse_probe(built.model, x, draws=0).rows,
        "sweep": lambda x: sweep(built.model, x, sigmas=[0.1], replicates=1).kl,
        "spread": lambda x: spread(built.model, x).weights,
        "spectrum": lambda x: spectral_gap(built.model, x, k=2).singular,
        "rank": lambda x: rank_profile(built.model, x).numbers,
    }[call]
    least = torch.finfo(torch.float32).min
    at = torch.arange(N)
    seen = (at[:, None] >= at) & ((at[:, None] >= N // 2) == (at >= N // 2))  # two documents
    mask = torch.where(seen, 0.0, least).expand(B, 1, -1, -1)
    logits, hidden = (built.model(IDS, attention_mask=x) for x in (mask == 0, mask))
    assert torch.allclose(logits, hidden, atol=1e-3) != added
    for mine in (mask, hiding(least)):  # causal, GPT-Neo's own mask hides what this one does not
        wanted = measure({"input_ids": IDS, "attention_mask": mine})
        inputs = {"input_ids": IDS, "attention_mask": mine == 0}
        if added:
            with pytest.raises(UnsupportedModelError, match=r"True and False: .* True as 1"):
                measure(inputs)
        else:
            np.testing.assert_allclose(np.array(measure(inputs)), np.array(wanted), rtol=1e-4)


@pytest.mark.parametrize("first", [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6]])
def test_a_row_may_begin_inside_of_a_document(first: list[int]) -> None:
    """As packing by blocks cuts them: where positions fall, another document begins."""
    model = tiny_llama()
    ids = IDS[:, :18]
    at = torch.tensor([first + [*range(6)] * 2]).expand(B, -1)
    inputs = {"input_ids": ids, "position_ids": at, "use_cache": False}
    settings: dict[str, Any] = {"sigmas": [0.3], "draws": 0, "sparse": 0.4}
    whole = collapse_probe(model, inputs, **settings)
    parts = [
        collapse_probe(model, {"input_ids": a, "position_ids": b}, **settings)
        for a, b in zip(ids.split(6, 1), at.split(6, 1), strict=True)
    ]
    np.testing.assert_array_equal(whole.rows, sum(x.rows for x in parts))
    np.testing.assert_allclose(whole.loose, sum(x.loose for x in parts), atol=1e-5)
    assert whole.rows[..., 1].sum() > 0
    scored = sweep(model, inputs, sigmas=[0.1], replicates=1)
    assert scored.positions.sum() == B * 15


def test_positions_by_the_batchs_width_are_refused_by_name() -> None:
    """Rotary positions of two lengths: a short prompt beside a long one is turned as that one."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }
    config = tiny_llama_config()
    config.rope_parameters = scaling
    model = bridge(LlamaForCausalLM, config)
    mask = ONES.clone()
    mask[1, 10:] = 0
    with pytest.raises(UnsupportedModelError, match=r"padding: wanted .* width of the batch"):
        collapse_probe(model, IDS, attention_mask=mask, draws=0)
    given = {"input_ids": IDS, "attention_mask": mask, "position_ids": torch.arange(N)[None]}
    for told in (torch.arange(N)[None], torch.arange(N).expand(B, -1)):
        with pytest.raises(UnsupportedModelError, match=r"padding: wanted .* width of the batch"):
            collapse_probe(model, given | {"position_ids": told}, draws=0)
    for same in (IDS, IDS[:, :10], [IDS[0].tolist(), IDS[1, :10].tolist()]):
        collapse_probe(model, same, draws=0)


def test_a_hook_that_goes_by_columns_is_found_at_every_width() -> None:
    model = tiny_llama()

    def column(z: Tensor, hook: Any) -> Tensor:
        out = z.clone()
        out[:, 8:9] = 0
        return out

    mask = ONES.clone()
    mask[0, :3] = 0
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", column)]):
        collapse_probe(model, IDS[:, :7], attention_mask=mask[:, :7], draws=0)
        with pytest.raises(UnsupportedModelError, match="left padding"):
            collapse_probe(model, IDS[:, :12], attention_mask=mask[:, :12], draws=0)


def test_rows_of_unequal_lengths_are_prompts_of_their_own() -> None:
    model, lists = tiny_llama(), [row[: 24 - 3 * i].tolist() for i, row in enumerate(IDS)]
    alone = encode(model, lists)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in lists]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for given in (rows, columns, BatchEncoding(columns)):
        found = encode(model, given)
        assert [row.tolist() for row in found.first] == lists
        assert found.padding == alone.padding == (0,) * B
    columns["attention_mask"][1][-2:] = [0, 0]
    assert encode(model, columns).padding == (0, 2, 0, 0)


def test_one_prompt_needs_no_axis() -> None:
    model = tiny_llama()
    flat = {"input_ids": IDS[0].tolist(), "attention_mask": [0, 0] + [1] * (N - 2)}
    found = encode(model, flat)
    assert found.first[0].tolist() == IDS[0, 2:].tolist()
    assert found.padding == (2,)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input_ids": IDS, "attention_maks": ONES}, "did you mean 'attention_mask'"),
        ({"input_ids": IDS, "past_key_values": object()}, "got 'past_key_values'"),
        ({"input_ids": IDS, "attention_mask": ONES * 2}, "wanted 1 for real tokens and 0"),
        ({"input_ids": IDS, "position_ids": AT[:, :5]}, r"wanted 'position_ids' of shape"),
        ({"input_ids": IDS, "position_ids": AT.expand(3, B, N)}, "wanted 'position_ids' of shape"),
        ({"attention_mask": ONES}, "wanted 'input_ids' among them"),
        (["a", None], "prompt 0: wanted token ids, as the model has no tokenizer"),
        ([[1, 2, 3], None], "prompt 1: wanted text or integer ids; got None"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1], "labels": [1]}], "the same names in each row"),
        ({"input_ids": [[1, 2], ["a"]]}, "wanted numbers in 'input_ids'"),
        ({"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": [[1, 1], [1, 1]]}, "the shape of"),
    ],
)
def test_what_is_no_input_is_named(given: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        collapse_probe(tiny_llama(), given)


def test_a_tokenizer_without_words_takes_no_text() -> None:
    """As transformers makes one of a directory without its files: any text becomes one token."""
    empty = Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>"))
    model = tiny_llama(tokenizer=PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="<end>"))
    with pytest.raises(ValueError, match=r"prompt 0: wanted token ids, .* without a vocabulary"):
        collapse_probe(model, "some words")
    with pytest.raises(ValueError, match="prompt 1: wanted at least 2 tokens; got none"):
        collapse_probe(model, [[1, 2, 3], []])
