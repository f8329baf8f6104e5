"""One layer whose scores are known: what a first token of great length hides, and what shows it.

A head's score for the first token is a / s_first. Where few dimensions make s_first some hundred
times the other tokens' s, it is as good as zero, whatever a is. Freeze the scale, and the first
token wins every row with a / s > the attended score, and none of a head with a < 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge.bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.interference import measure

FIRST, CONTENT, OTHER = 0, 1, 2
PROMPT = torch.tensor([[FIRST, CONTENT, OTHER, OTHER, OTHER]])
ROWS = 4  # of each head, all on the content token


def model(size: float) -> TransformerBridge:
    """Pairs of dimensions, + and -, for a mean of 0: outliers, the first token's, the others'."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=4)
    config.architectures = ["GPT2LMHeadModel"]
    hf = GPT2LMHeadModel(config)
    hf.set_attn_implementation("eager")
    block, pair = hf.transformer.h[0], torch.tensor([1.0, -1.0])
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        words = hf.transformer.wte.weight
        words[[CONTENT, OTHER], 0:2] = pair
        words[FIRST, 0:2], words[FIRST, 2:4] = size * pair, pair
        words[CONTENT, 4:6], words[OTHER, 6:8] = pair, pair
        block.ln_1.weight.fill_(1.0)
        block.ln_2.weight.fill_(1.0)
        hf.transformer.ln_f.weight.fill_(1.0)
        q, k = block.attn.c_attn.weight[:, :8], block.attn.c_attn.weight[:, 8:16]
        block.attn.c_attn.weight[:, 16:] = torch.eye(8)  # values, which no score depends on
        strength = math.sqrt(12)  # the content's score: 12
        for head, sign in ((0, 1.0), (1, -1.0)):
            q[4, 4 * head] = q[6, 4 * head] = strength
            k[4, 4 * head] = strength
            k[2, 4 * head] = 2 * sign * strength  # the first token's score at equal length: +-24
    built = build_bridge_from_module(hf.eval(), "GPT2LMHeadModel", hf_config=config)
    return built.eval()


def moved(size: float, **options: Any) -> list[list[int]]:
    """Content rows, those that move, and those that move to the first token, by head."""
    report = measure(model(size), PROMPT, on="k", outliers=2, **options)
    rows, loose, first = report.rows[0], report.loose[0, 0, 0], report.to_first[0, 0, 0]
    assert not rows[..., 1].any()
    return np.stack([x[:, 0, 0] for x in (rows, loose, first)]).tolist()


def test_a_long_first_token_hides_its_score() -> None:
    all_to_first = [[ROWS, ROWS], [ROWS, 0], [ROWS, 0]]
    none = [[ROWS, ROWS], [0, 0], [0, 0]]
    assert moved(100.0) == all_to_first
    assert moved(100.0, part="outliers") == all_to_first
    assert moved(100.0, part="rest") == none
    assert moved(100.0, spare_first=True) == none


@pytest.mark.parametrize("size", [4.0, 10.0, 30.0])
def test_any_length_that_hides_it_is_enough(size: float) -> None:
    """Its score is 24 sqrt(2 / (size^2 + 1)), the content's 12: its rows are sparse from 3.6 on."""
    assert moved(size) == [[ROWS, ROWS], [ROWS, 0], [ROWS, 0]]


def test_a_first_token_of_the_others_length_is_attended_to() -> None:
    report = measure(model(1.0), PROMPT, on="k")
    assert report.rows[0, :, 0].tolist() == [[0, ROWS], [ROWS, 0]]
    assert not report.loose.any()
