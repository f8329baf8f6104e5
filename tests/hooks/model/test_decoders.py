"""What a decoder reads beside its encoder: labels, targets, masks and positions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

import hooks
from hooks import UnsupportedModelError, collapse_probe, sweep
from tests.support import builders
from tests.support.given import (
    IDS,
    probed,
)
from tests.support.models import (
    tiny_llama,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:transformer_lens", "ignore::FutureWarning"
)


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


PADDED = [("even", "narrow"), ("padded", "left"), ("even", "right")]
OTHERS = [(e, d) for e in ("even", "padded") for d in ("even", "left", "right", "narrow")]


@pytest.fixture(scope="module")
def t5gemma() -> Any:
    return builders.build("T5GemmaForConditionalGeneration").model


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        *PADDED,
        *(pytest.param(*x, marks=pytest.mark.slow) for x in OTHERS if x not in PADDED),
    ],
)
def test_a_decoders_positions_are_cut_as_its_tokens_are(
    t5gemma: Any, encoder: str, decoder: str
) -> None:
    """Those that T5Gemma counts by itself, named: nothing changes; doubled, they are others."""
    model = t5gemma
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
