"""What the model is given: the pass that is measured is the pass the user makes.

The oracle is Hugging Face's own model, called with the same inputs: its attention weights say which
rows are sparse and which attend to a first token, its logits what the loss is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BatchEncoding, LlamaForCausalLM

import hooks
from hooks import UnsupportedModelError, collapse_probe, rank_profile, spectral_gap, spread, sweep
from hooks.model.encoding import encode
from qkvnorm_lens.text import windows
from tests.models import (
    _bridge,
    tiny_gpt2,
    tiny_hf,
    tiny_llama,
    tiny_llama_config,
    tokens,
)
from tests.support import builders

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)

B, N = 4, 24
IDS = tokens(B, N, seed=3)
ONES = torch.ones_like(IDS)
AT = torch.arange(N).expand(B, N)
PACKED = torch.cat([torch.arange(9), torch.arange(8), torch.arange(7)]).expand(B, N)

POSITIONS = {
    "as counted": AT,
    "a gap of 20": torch.where(AT < 10, AT, AT + 20),
    "stretched by two": AT * 2,
    "all zero": AT * 0,
    "all seven": AT * 0 + 7,
    "backwards": AT.flip(1),
    "begun at five": AT + 5,
    "every one twice": AT // 2,
    "packed": PACKED,
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_hf(LlamaForCausalLM, tiny_llama_config())


def weights(hf: Any, ids: Tensor, **inputs: Any) -> list[Tensor]:
    """Attention weights of each layer, ``[batch, head, query, key]``."""
    with torch.no_grad():
        out = hf(ids, output_attentions=True, **inputs)
    return [a.double() for a in out.attentions]


def sparse_rows(
    attentions: Sequence[Tensor], starts: Sequence[int] = (0,), sparse: float = 0.95
) -> tuple[int, int]:
    """Sparse rows with two or more visible keys, and those of them on a first token."""
    rows = sinks = 0
    for a in attentions:
        top, star = a.max(-1)
        chosen = (top >= sparse) & ((a > 0).sum(-1) > 1)
        rows += int(chosen.sum())
        sinks += int((chosen & torch.isin(star, torch.tensor(list(starts)))).sum())
    return rows, sinks


def probed(model: Any, given: Any, **options: Any) -> tuple[int, int]:
    report = collapse_probe(model, given, draws=0, sigmas=[0.1], **options)
    return int(report.rows.sum()), int(report.rows[..., 1].sum())


def loss_of(hf: Any, ids: Tensor, **inputs: Any) -> float:
    with torch.no_grad():
        z = hf(ids, **inputs).logits[:, :-1].double().log_softmax(-1)
    return float(-z.gather(-1, ids[:, 1:, None]).mean())


# -- masks, positions, caches -----------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_those_of_the_users_own_call(
    llama: Any, plain: Any, name: str, masked: bool
) -> None:
    named = {"position_ids": POSITIONS[name]} | ({"attention_mask": ONES} if masked else {})
    starts = (0, 9, 17) if name == "packed" else (0,)
    expected = sparse_rows(weights(plain, IDS, **named), starts)
    assert expected[0] > 20
    assert probed(llama, {"input_ids": IDS, **named}) == expected


@pytest.mark.parametrize("name", ["a gap of 20", "all zero", "packed"])
def test_without_a_cache_documents_are_apart_as_in_the_users_own_call(
    llama: Any, plain: Any, name: str
) -> None:
    """Without mask and cache transformers hides earlier documents, and so does the probe's pass."""
    named = {"position_ids": POSITIONS[name], "use_cache": False}
    starts = (0, 9, 17) if name == "packed" else (0,)
    apart = sparse_rows(weights(plain, IDS, **named), starts)
    assert apart != sparse_rows(weights(plain, IDS, position_ids=POSITIONS[name]), starts)
    assert probed(llama, {"input_ids": IDS, **named}) == apart


@pytest.mark.parametrize("name", ["a gap of 20", "all zero", "stretched by two"])
def test_the_sweeps_clean_loss_is_the_users_own(llama: Any, plain: Any, name: str) -> None:
    named = {"attention_mask": ONES, "position_ids": POSITIONS[name]}
    report = sweep(llama, {"input_ids": IDS, **named}, sigmas=[0.1], replicates=1)
    measured = float(report.clean_loss.sum() / report.targets.sum())
    assert measured == pytest.approx(loss_of(plain, IDS, **named), rel=1e-5)


def test_documents_kept_apart_are_each_its_own_prompt(llama: Any) -> None:
    """Rows and sinks of a packed prompt are those of its documents alone."""
    packed = {"input_ids": IDS, "position_ids": PACKED, "use_cache": False}
    edges = (0, 9, 17, N)
    alone = [row[a:b].tolist() for row in IDS for a, b in pairwise(edges)]
    assert probed(llama, packed) == probed(llama, alone)


def test_each_documents_first_token_is_a_first_token(llama: Any, plain: Any) -> None:
    report = collapse_probe(llama, {"input_ids": IDS, "position_ids": PACKED}, draws=0)
    first = {0, 9, 17}
    frame = report.fragile(10_000)
    assert (frame["sink"] == frame["key_pos"].isin(first)).all()
    assert 0 < frame["sink"].sum() > (frame["key_pos"] == 0).sum()
    assert not report.fragile(10_000, content=True)["key_pos"].isin(first).any()
    listed = [report.sigma_at(0.01, content=True), report.sigma_at(0.01)]
    assert all(np.isfinite(listed))
    assert any("packed documents" in words for words in report.model["given"])
    a = weights(plain, IDS, position_ids=PACKED)
    received = spread(llama, {"input_ids": IDS, "position_ids": PACKED}).to_frame("head")
    for layer in range(2):
        shares = a[layer].sum(2)[..., [0, 9, 17]].sum((0, 2)) / a[layer].sum((0, 2, 3))
        mine = received[received["layer"] == layer]["first_share"]
        np.testing.assert_allclose(mine, shares.numpy(), rtol=1e-5)


def test_a_documents_last_token_has_no_next_one(llama: Any) -> None:
    report = sweep(llama, {"input_ids": IDS, "position_ids": PACKED}, sigmas=[0.1], replicates=1)
    assert (report.targets == N - 3).all()


def test_a_mask_of_four_axes_goes_along(llama: Any, plain: Any) -> None:
    """Documents kept apart by a mask of the user's own."""
    of = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 8, 7]))
    seen = (of[:, None] == of) & torch.ones(N, N).tril().bool()
    mask = torch.zeros(B, 1, N, N).masked_fill(~seen, torch.finfo(torch.float32).min)
    named = {"attention_mask": mask, "position_ids": PACKED}
    expected = sparse_rows(weights(plain, IDS, **named), (0, 9, 17))
    assert probed(llama, {"input_ids": IDS, **named}) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_and_positions_count_from_the_first_token(
    llama: Any, plain: Any, side: str
) -> None:
    mask = ONES.clone()
    for row, n in enumerate((0, 3, 7, 11)):
        mask[row, slice(0, n) if side == "left" else slice(N - n, N)] = 0
    rows = sinks = 0
    for row, real in zip(IDS, mask.bool(), strict=True):
        one = sparse_rows(weights(plain, row[real][None]))
        rows, sinks = rows + one[0], sinks + one[1]
    for given in (mask, mask.bool(), mask.float(), mask.numpy()):
        assert probed(llama, {"input_ids": IDS, "attention_mask": given}) == (rows, sinks)
    report = collapse_probe(llama, {"input_ids": IDS, "attention_mask": mask}, draws=0)
    assert report.padding.tolist() == [0, 3, 7, 11]
    assert any("padding is cut off" in words for words in report.model["given"])


# -- forms of inputs --------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
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


def test_a_decoders_mask_of_four_axes_is_refused_by_name() -> None:
    model = builders.build("T5ForConditionalGeneration").model
    inputs = {"input_ids": READ, "decoder_input_ids": READ}
    mask = torch.ones(3, 1, 9, 9).tril()
    with pytest.raises(ValueError, match=r"decoder_attention_mask: wanted \[batch, pos\]; got"):
        collapse_probe(model, inputs | {"decoder_attention_mask": mask}, draws=0)


@pytest.mark.parametrize("form", [dict, BatchEncoding])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (7, 9, 9), (9, 7, 5)])
def test_a_decoders_left_padding_is_checked_whoever_else_is_padded(
    form: type, lengths: tuple[int, ...]
) -> None:
    """BART counts positions from the first column: prompt 1 alone is padded so."""
    model = builders.build("BartForConditionalGeneration").model
    mask, target = torch.ones_like(READ), torch.ones_like(READ)
    for row, n in enumerate(lengths):
        mask[row, n:] = 0
    target[1, :3] = 0
    given = {"input_ids": READ, "attention_mask": mask, "decoder_input_ids": READ}
    with pytest.raises(UnsupportedModelError, match="left padding"):
        collapse_probe(model, form(given | {"decoder_attention_mask": target}), draws=0)
    lists = {name: x.tolist() for name, x in given.items()}
    lists["decoder_attention_mask"] = target.tolist()
    lists["input_ids"] = [row[:n] for row, n in zip(READ.tolist(), lengths, strict=True)]
    lists["attention_mask"] = [[1] * n for n in lengths]
    with pytest.raises(UnsupportedModelError, match="left padding"):
        collapse_probe(model, lists, draws=0)
    collapse_probe(model, form(given | {"decoder_attention_mask": target.flip(1)}), draws=0)


@pytest.mark.parametrize("encoder", ["even", "padded"])
@pytest.mark.parametrize("decoder", ["even", "left", "right", "narrow"])
def test_a_decoders_positions_are_cut_as_its_tokens_are(encoder: str, decoder: str) -> None:
    """Those that T5Gemma counts by itself, named: nothing changes; doubled, they are others."""
    model = builders.build("T5GemmaForConditionalGeneration").model
    mask, own = torch.ones_like(READ), torch.ones_like(READ)
    if encoder == "padded":
        mask[0, 6:] = 0
    if decoder in ("left", "right"):
        own[1, slice(0, 3) if decoder == "left" else slice(6, 9)] = 0
    width = 5 if decoder == "narrow" else 9
    given = {
        "input_ids": READ,
        "attention_mask": mask,
        "decoder_input_ids": READ.flip(0)[:, :width],
        "decoder_attention_mask": own[:, :width],
    }
    counted = (own.cumsum(-1) - 1).clamp_min(0)[:, :width]
    settings: dict[str, Any] = {"sigmas": [0.3], "draws": 0}
    plain = collapse_probe(model, given, **settings)
    named = collapse_probe(model, given | {"decoder_position_ids": counted}, **settings)
    np.testing.assert_array_equal(named.rows, plain.rows)
    np.testing.assert_allclose(named.loose, plain.loose, atol=1e-6)
    alone = [  # each prompt without its padding
        {
            "input_ids": READ[i : i + 1][:, mask[i] == 1],
            "decoder_input_ids": given["decoder_input_ids"][i : i + 1][:, own[i, :width] == 1],
            "decoder_position_ids": 2 * counted[i : i + 1][:, own[i, :width] == 1],
        }
        for i in range(3)
    ]
    doubled = collapse_probe(model, given | {"decoder_position_ids": 2 * counted}, **settings)
    each = [collapse_probe(model, x, **settings) for x in alone]
    np.testing.assert_array_equal(doubled.rows, np.concatenate([x.rows for x in each], 2))
    assert not np.array_equal(doubled.loose, plain.loose)


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
    model = _bridge(LlamaForCausalLM, config)
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


# -- decoders ---------------------------------------------------------------------------------

SEQ2SEQ = ("T5ForConditionalGeneration", "BartForConditionalGeneration")
PAD = 1
READ = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
SEEN = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(1))
REAL = (9, 6, 4)  # real labels of each row; the decoder also reads a start token


@pytest.fixture(scope="module", params=SEQ2SEQ)
def seq2seq(request: pytest.FixtureRequest) -> Any:
    return builders.build(request.param, decoder_start_token_id=2, pad_token_id=PAD)


def _labels() -> Tensor:
    labels = READ.clone()
    for row, n in zip(labels, REAL, strict=True):
        row[n:] = -100
    return labels


def test_labels_give_the_decoder_what_the_model_would_give_it(seq2seq: Any) -> None:
    """As a collator hands them over; and where it made the decoder's tokens of them itself."""
    model, labels = seq2seq.model, _labels()
    made = model.original_model.prepare_decoder_input_ids_from_labels(labels=labels)
    mask = torch.ones_like(SEEN)
    mask[1, 12:] = 0
    alone = [row[: n + 1].tolist() for row, n in zip(made, REAL, strict=True)]
    source = [row[real.bool()].tolist() for row, real in zip(SEEN, mask, strict=True)]
    expected = probed(model, source, decoder_tokens=alone, sparse=0.5)
    both = {"input_ids": SEEN, "attention_mask": mask}
    for named in (
        {"labels": labels},
        {"labels": labels, "decoder_input_ids": made},
        {"decoder_input_ids": made},  # padded with the pad token
        {"labels": labels.tolist()},
    ):
        assert probed(model, both | named, sparse=0.5) == expected


def test_padded_targets_are_cut_like_the_decoders_tokens(seq2seq: Any) -> None:
    model, labels = seq2seq.model, _labels()
    made = model.original_model.prepare_decoder_input_ids_from_labels(labels=labels)
    named = {"input_ids": SEEN, "decoder_input_ids": made, "labels": labels}
    report = sweep(model, named, targets=labels, sigmas=[0.1], replicates=1)
    assert report.targets.tolist() == list(REAL)
    with torch.no_grad():
        z = copy.deepcopy(model).original_model(SEEN, decoder_input_ids=made).logits
    log_p = z.double().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    wanted = -(log_p * (labels != -100)).sum(-1)
    np.testing.assert_allclose(report.clean_loss, wanted.numpy(), rtol=1e-4)


def test_a_report_says_in_a_line_what_the_model_was_given() -> None:
    model = tiny_llama()
    assert collapse_probe(model, IDS, draws=0).model["given"] == []
    report = collapse_probe(model, {"input_ids": IDS, "labels": IDS}, draws=0)
    assert "labels are not part of the pass" in report.summary()
    assert hooks.rank_profile(model, {"input_ids": IDS, "labels": IDS}).model["given"]


# -- BOS and other special tokens -------------------------------------------------------------

WORDS = ["the", "cat", "sat", "on", "mat", "user", "assistant", "system"]
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<turn>", "<end>"]
TEMPLATE = (
    "{{ BOS }}{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant{% endif %}"
)


@pytest.fixture(scope="module", params=["<s> ", ""], ids=["template with bos", "without"])
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose tokenizer has a chat template, with a BOS of its own or none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<turn>", "<end>"],
        chat_template=TEMPLATE.replace("{{ BOS }}", request.param),
    ).save_pretrained(folder)
    return tiny_llama(tokenizer=AutoTokenizer.from_pretrained(folder))


CHAT = [{"role": "user", "content": "the cat sat"}]


def test_a_templates_text_gets_no_second_bos(speaker: Any) -> None:
    """Its text, its messages and its own ids are one prompt."""
    tokenizer = speaker.tokenizer
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for given in (text, [text], CHAT, [CHAT], [ids]):
        found = encode(speaker, given)
        assert [row.tolist() for row in found.first] == [ids], given
    assert "got no BOS" in encode(speaker, text).notes[0]
    assert "chat template" in encode(speaker, CHAT).notes[0]
    report = collapse_probe(speaker, [CHAT, "the cat"], draws=0, sparse=0.5)
    assert "written by the tokenizer's chat template (1 of 2 prompts)" in report.summary()


@pytest.mark.parametrize(
    ("text", "prepend_bos", "expected"),
    [
        ("the cat", None, "<s> the cat"),
        ("<s> the cat", None, "<s> the cat"),
        ("<s> the cat", True, "<s> <s> the cat"),
        ("the cat", False, "the cat"),
        ("<s> the cat", False, "<s> the cat"),
        ("<unk> cat", None, "<s> <unk> cat"),
        ("the cat </s>", None, "<s> the cat </s>"),
        ("<pad> the <pad> cat <pad>", None, "<s> <pad> the <pad> cat <pad>"),
        ("<s> the </s> <s> cat </s>", None, "<s> the </s> <s> cat </s>"),
    ],
)
def test_special_tokens_in_a_text_are_what_they_say(
    speaker: Any, text: str, prepend_bos: bool | None, expected: str
) -> None:
    ids = speaker.tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert encode(speaker, text, prepend_bos=prepend_bos).first[0].tolist() == ids


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose tokenizer puts a token before and one behind, as BERT's does."""
    from transformers import AutoTokenizer, BertTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return tiny_llama(tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("begins", ["", "[CLS] "])
@pytest.mark.parametrize("ends", ["", " [SEP]"])
def test_a_text_with_its_own_last_token_gets_no_second(reader: Any, begins: str, ends: str) -> None:
    """What was written out is what the tokenizer would have put there, once."""
    given, ids = f"{begins}the cat sat{ends}", reader.tokenizer("the cat sat")["input_ids"]
    found = encode(reader, given)
    assert found.first[0].tolist() == ids == [2, 5, 6, 7, 3]
    notes = " ".join(found.notes)
    assert ("got no BOS" in notes, "got none after it" in notes) == (bool(begins), bool(ends))
    whole = windows(reader, given, length=8)
    assert whole.ids == [ids]
    first, *later = windows(reader, given, length=4).ids
    assert first == ids[:4]
    # Each window begins as a prompt does, unless the text brought its own beginning.
    assert later == ([] if begins else [[2, 3]])


def test_pad_tokens_are_padding_only_where_rows_differ_in_them(speaker: Any) -> None:
    """A text, a list and a tensor of one row keep them; in a batch the longest row has none."""
    pad, row = 2, [0, 6, 2, 7, 2]
    for given in ([row], torch.tensor(row), torch.tensor([row])):
        assert encode(speaker, given).first[0].tolist() == row
    batch = torch.tensor([row, [0, 6, 7, 2, 2], [0, 6, 2, 2, 2]])
    found = encode(speaker, batch)
    assert [r.tolist() for r in found.first] == [row, [0, 6, 7, 2], [0, 6, 2]]
    assert found.padding == (0, 1, 2)
    assert "is taken for padding" in found.notes[0]
    left = encode(speaker, batch.flip(1))
    assert left.padding == (0, 1, 2)
    assert encode(speaker, batch, attention_mask=torch.ones_like(batch)).padding == (0, 0, 0)
    assert pad == speaker.tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([[{"role": "user", "content": "a"}], "the", 3], "prompt 2: wanted|tokens: wanted integer"),
        ([CHAT, None], "prompt 1: wanted text or integer ids; got None"),
        ([CHAT, ""], "prompt 1: wanted text; got an empty one"),
        (["the cat", 3.5], "prompt 1: wanted|tokens: wanted integer ids"),
    ],
)
def test_what_is_no_text_is_named(speaker: Any, given: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        encode(speaker, given)
