"""Positions and masks that are removed: as if they had never been, or said to be still there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import hooks
from hooks import SymmetryReport, UnsupportedModelError
from hooks.measures.symmetry.measure import neighbours
from hooks.measures.symmetry.report import REACH
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests.support import builders, models
from tests.support.symmetry import (
    BOTH_WAYS,
    LENGTH,
    NAMES,
    TWO,
    gap,
    ids,
    nope,
    ours,
    plain,
)


def twin(of: QKVNormTransformer, **options: Any) -> QKVNormTransformer:
    other = QKVNormTransformer(QKVNormConfig.from_json({**of.cfg.to_json(), **options})).double()
    weights = {k: v for k, v in of.state_dict().items() if k in other.state_dict()}
    other.load_state_dict(weights)
    return other.eval()


def numbers(report: SymmetryReport, variant: str) -> list[np.ndarray]:
    names = ("kl", "tv", "logits", "moved", "stream", "added", "similarity")
    return [getattr(report, name)[report.settings.variants.index(variant)] for name in names]


@pytest.mark.parametrize("removed", [NAMES[1], NAMES[2], NAMES[3]])
def test_removed_is_never_having_had_it(removed: str) -> None:
    rotary = plain("qkv", positional_embedding_type="rotary")
    options: dict[str, Any] = {}
    if removed != "mask removed":
        options["positional_embedding_type"] = "none"  # a rotation by nothing
    if removed != "positions removed":
        options["attention_dir"] = "bidirectional"
    without = twin(rotary, **options)
    a, b = gap(to_bridge(rotary)), gap(to_bridge(without))
    for mine, theirs in zip(numbers(a, removed), numbers(b, "as is"), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-10)


def test_a_sliding_window_goes_with_the_mask() -> None:
    windowed = plain(window_size=3)
    a, b = (gap(to_bridge(m)) for m in (windowed, twin(windowed, window_size=None)))
    for mine, theirs in zip(numbers(a, "mask removed"), numbers(b, "mask removed"), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-10)
    assert a.kl[0, 0, 0] != pytest.approx(b.kl[0, 0, 0])


REFERENCES = {
    "gpt2": (models.tiny_gpt2, lambda: models.tiny_hf(GPT2LMHeadModel, models.tiny_gpt2_config())),
    "llama": (
        models.tiny_llama,
        lambda: models.tiny_hf(LlamaForCausalLM, models.tiny_llama_config()),
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("variant", NAMES)
@torch.no_grad()
def test_equals_a_plain_computation(kind: str, variant: str) -> None:
    """Hugging Face's own model, one permuted prompt at a time, its mask written out.

    Llama norms and turns in float32, so that its digits end there.
    """
    build, reference = REFERENCES[kind]
    report = gap(build().double(), keep_first=True)
    hf = reference().double()
    bias = torch.full((LENGTH, LENGTH), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    if variant in NAMES[2:]:
        bias.zero_()
    at = torch.arange(LENGTH) if variant in (NAMES[0], NAMES[2]) else torch.zeros(LENGTH).long()

    def run(tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = hf(
            tokens[None],
            attention_mask=bias[None, None],
            position_ids=at[None],
            output_hidden_states=True,
        )
        return out.logits[0, -1], [x[0, -1] for x in out.hidden_states]

    frame = report.to_frame("permutation")
    for prompt, tokens in enumerate(ids):
        logits, stream = run(tokens)
        p = logits.softmax(-1)
        for number, order in enumerate(report.orders[prompt]):
            assert order[0] == 0
            assert order[-1] == LENGTH - 1
            other, its_stream = run(tokens[order.tolist()])
            q = other.softmax(-1)
            wanted = {
                "kl": float((p * (p / q).log()).sum()),
                "tv": float((p - q).abs().sum()) / 2,
                "logits": float((logits - other).abs().max()),
                "moved": bool(logits.argmax() != other.argmax()),
            }
            got = frame[
                (frame["variant"] == variant)
                & (frame["prompt"] == prompt)
                & (frame["permutation"] == number)
            ].iloc[0]
            for name, value in wanted.items():
                assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
            i = NAMES.index(variant)
            for point in range(2):  # the last is behind the final norm there
                change = (its_stream[point] - stream[point]).norm() / stream[point].norm()
                assert report.stream[i, prompt, number, point] == pytest.approx(
                    float(change), rel=1e-5, abs=1e-6
                )


@torch.no_grad()
def test_what_a_block_adds_is_its_output_less_its_input() -> None:
    bridge = ours("qkv")
    report = gap(bridge, permutations=1)
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x[:, -1]

    names = ["blocks.0.hook_out", "blocks.1.hook_out"]
    rows = torch.stack([ids[0], ids[0][report.orders[0][0].tolist()]])
    bridge.run_with_hooks(rows, fwd_hooks=[(n, keep) for n in names])
    before, after = (seen[n] for n in names)
    change = (after - before)[1] - (after - before)[0]
    wanted = float(change.norm() / after[0].norm())
    assert report.added[0, 0, 0, 1] == pytest.approx(wanted, rel=1e-9)


def test_neighbours_equal_a_loop_over_positions() -> None:
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (sums,), (share,) = neighbours([x])
    rows = x.numpy()[1:]
    n = len(rows)
    unit = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    cosines = {(i, d): float(unit[i] @ unit[i - d]) for i in range(n) for d in range(1, i + 1)}
    for d in range(1, REACH + 1):
        of = [c for (_, e), c in cosines.items() if e == d]
        assert sums[d - 1, 0] == pytest.approx(sum(of))
        assert sums[d - 1, 1] == len(of)
    won = [
        cosines[i, d] > cosines[i, e]
        for i in range(n)
        for d in range(1, min(i, REACH) + 1)
        for e in range(d + 1, min(i, REACH) + 1)
    ]
    assert share == pytest.approx(np.mean(won))


def test_prefix_means_are_alike_by_distance() -> None:
    """Uniform causal attention over tokens: means of i and j of them share the first j."""
    model = plain("none", positional_embedding_type="none", attn_only=True, skip="none",
                  n_layers=1, d_model=256, d_head=256, n_heads=1)  # fmt: skip
    with torch.no_grad():
        for site in "qk":
            model.get_parameter(f"layers.0.attn.{site}.weight").mul_(0.01)
        for site in "vo":
            model.get_parameter(f"layers.0.attn.{site}.weight").copy_(torch.eye(256))
    tokens = torch.arange(30)[None]
    report = hooks.symmetry_gap(to_bridge(model), tokens, progress=False)
    frame = report.to_frame("layer").set_index(["variant", "label"])
    assert frame.loc[("as is", "L0"), "nearer"] > 0.95
    assert frame.loc[("as is", "embed"), "nearer"] == pytest.approx(0.5, abs=0.1)
    assert np.isnan(frame.loc[("as is", "embed"), "added"])
    distances = report.to_frame("distance").set_index(["variant", "label", "distance"])
    means = model.get_parameter("tok_embed.weight").detach()[:30].cumsum(0).numpy()
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    for d in (1, 4, 16):
        got = distances.loc[("as is", "L0", d)]
        wanted = (unit[1 + d :] * unit[1:-d]).sum(1)
        assert got["similarity"] == pytest.approx(wanted.mean(), abs=1e-3)
        assert got["pairs"] == len(wanted) == 29 - d
    # Without the mask every row is the mean of all: as like as can be, near or far.
    assert frame.loc[("mask removed", "L0"), "distant"] == pytest.approx(1)


def test_alibi_is_said_not_to_be_removed() -> None:
    bloom = models.tiny_bloom()
    report = gap(bloom)
    assert report.settings.variants == ("as is",)
    assert "positions are not removed: its forward pass takes no position_ids" in str(report)
    assert "mask is not removed" in str(report)
    with pytest.raises(UnsupportedModelError, match="positions removed: wanted a model whose"):
        gap(bloom, positions=False)
    with pytest.raises(UnsupportedModelError, match="mask removed: wanted a model whose"):
        gap(bloom, mask=False)
    assert gap(bloom, positions=True, mask=True).settings.variants == ("as is",)


def test_alibi_without_the_mask() -> None:
    """MPT takes a mask of pairs, and its slopes still know the order."""
    report = gap(builders.build("MPTForCausalLM").model)
    assert report.settings.variants == ("as is", "mask removed")
    assert not report.vanishes("mask removed")


class _Deaf(QKVNormTransformer):
    """Takes position ids and does not use them."""

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "position_ids": None})


@pytest.mark.parametrize(("kind", "where"), [("standard", "stream"), ("rotary", "scores of L0")])
def test_ids_that_are_ignored_are_found_out(kind: str, where: str) -> None:
    source = plain(positional_embedding_type=kind)
    deaf = _Deaf(source.cfg).double().eval()
    deaf.load_state_dict(source.state_dict())
    # The bridge asks for the arguments of the module's own forward.
    report = gap(to_bridge(deaf), mask=True)
    assert report.settings.variants == ("as is",)
    assert report.model["positions"]["status"] == "unremovable"
    assert where in report.model["positions"]["why"]


def test_convolutions_know_the_order_too() -> None:
    report = gap(builders.build("Lfm2ForCausalLM").model)
    assert "positions removed" not in report.settings.variants
    assert "leave positions in the residual stream" in report.summary()


def test_what_else_knows_the_order_shows() -> None:
    """A hook that weighs tokens by their position, behind all attention."""
    bridge = nope()

    def weigh(x: Tensor, hook: Any) -> Tensor:
        at = torch.arange(x.shape[1])[:, None].to(x)
        return x + 0.1 * torch.cumsum(x * at, 1)

    assert "Something else" not in gap(bridge).summary()
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_out", weigh)]):
        report = gap(bridge)
    assert report.model["positions"]["status"] == "absent"
    assert not report.vanishes("mask removed")
    assert "Something else than positions and mask tells this model the order." in str(report)


def test_models_without_a_mask() -> None:
    report = gap(builders.build("BertForMaskedLM").model)
    assert report.settings.variants == ("as is", "positions removed")
    assert report.model["mask"]["status"] == "absent"
    assert report.vanishes("positions removed")
    assert not report.vanishes("as is")
    assert "The model has no mask." in report.summary()


def test_what_is_absent_need_not_be_removed() -> None:
    for options in ({"positions": False}, {"positions": False, "mask": True}, {"positions": True}):
        report = gap(TWO["pre"], **options)
        assert report.settings.variants[0] == "as is"
    assert "The model has no positions." in report.summary()
    assert gap(BOTH_WAYS[2], positions=False, mask=False).settings.variants == ("as is",)


def test_an_encoder_and_a_decoder_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="wanted a model of one sequence of tokens"):
        gap(builders.build("T5ForConditionalGeneration").model)
