"""hooks.symmetry_gap: what is invariant to permutations by construction is measured to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import hooks
from hooks import SymmetryReport, UnsupportedModelError
from hooks.measures.symmetry.measure import neighbours
from hooks.measures.symmetry.report import REACH
from qkvnorm_lens.models.bridge import to_bridge
from qkvnorm_lens.models.config import QKVNormConfig
from qkvnorm_lens.models.model import QKVNormTransformer
from tests import models
from tests.support import builders
from tests.watching import Found, one_thread, shape_checks_off, tiny_gemma2

LENGTH = 9
ids = models.tokens(2, LENGTH)
NAMES = ("as is", "positions removed", "mask removed", "both removed")
EXACT = 1e-10  # in float64


def changes_all(order: list[int]) -> bool:
    return not any(torch.equal(tokens[order], tokens) for tokens in ids)


order = (
    st.permutations(range(LENGTH - 1))
    .map(lambda order: [*order, LENGTH - 1])
    .filter(changes_all)  # others are refused
)
several = st.lists(order, min_size=8, max_size=8)  # a call looks at many at once
few = settings(max_examples=6)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def plain(placement: str = "pre", *, enlarged: float = 3.0, **options: Any) -> QKVNormTransformer:
    """A small model of ours with enlarged weights, in float64."""
    sizes = {"d_model": 16, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 32, "d_vocab": 97}
    cfg = QKVNormConfig(placement=placement, d_mlp=20, seed=3, **{**sizes, **options})
    model = QKVNormTransformer(cfg).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(enlarged)
            elif "bias" in name:
                parameter.copy_(0.1 * torch.arange(len(parameter)))
    return model


def ours(placement: str = "pre", **options: Any) -> Any:
    return to_bridge(plain(placement, **options))


def nope(placement: str = "pre", **options: Any) -> Any:
    return ours(placement, positional_embedding_type="none", **options)


def gap(model: Any, **options: Any) -> SymmetryReport:
    return hooks.symmetry_gap(model, ids, **{"progress": False, "permutations": 3, **options})


KINDS: dict[str, Any] = {
    "gpt2": models.tiny_gpt2,
    "llama": models.tiny_llama,
    "qwen3": models.tiny_qwen3,
    "gemma2": tiny_gemma2,
    "learned": lambda: ours("pre"),
    "rotary": lambda: ours("qkv", positional_embedding_type="rotary"),
    "sinusoidal": lambda: ours("none", positional_embedding_type="sinusoidal"),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]().double()


GPT2 = models.tiny_gpt2()
SIZED = ("logits", "tv", "stream", "floor_logits", "floor_tv", "floor_stream", "kl", "moved",
         "added", "nearer")  # fmt: skip


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return GPT2


# -- what follows from the construction -------------------------------------------------------

ONE = {p: nope(p, n_layers=1) for p in ("none", "pre", "qkv")}
# Not so large that a saturated row hides a swap of two tokens that it hardly attends to.
TWO = {p: nope(p, enlarged=1.0, initializer_range=0.2) for p in ("none", "pre", "qkv")}
BOTH_WAYS = {n: nope(attention_dir="bidirectional", n_layers=n) for n in (1, 2, 4)}
SKIPS = {s: nope(n_layers=1, skip=s) for s in ("attn", "mlp", "none")}


@pytest.mark.parametrize(
    "which", ["none", "pre", "qkv", 1, 2, 4, "skip attn", "skip mlp", "skip none"]
)
@few
@given(orders=several)
def test_invariant_by_construction(which: Any, orders: list[list[int]]) -> None:
    """No positions, and no mask or one causal layer: every permutation of the earlier tokens."""
    known = {**ONE, **BOTH_WAYS, **{f"skip {name}": m for name, m in SKIPS.items()}}
    report = gap(known[which], permutations=orders, mask=True)
    assert report.settings.variants == ("as is",)
    for name in ("logits", "tv", "stream", "added"):
        assert getattr(report, name).max() < EXACT, name
    assert report.vanishes("as is")
    assert not report.moved.any()


@pytest.mark.parametrize("placement", ["none", "pre", "qkv"])
@few
@given(orders=several)
def test_two_causal_layers_see_order_in_the_second(placement: str, orders: list[list[int]]) -> None:
    """The first layer's last row is one of a set; the second reads rows that saw prefixes."""
    report = gap(TWO[placement], permutations=orders, mask=True)
    embed, first, second = np.moveaxis(report.stream[0], -1, 0)
    assert embed.max() == 0
    assert first.max() < EXACT
    assert report.added[0, :, :, 0].max() < EXACT
    for prompt, tokens in enumerate(ids):
        for run, order in enumerate(orders):
            assert not torch.equal(tokens[order], tokens)
            assert second[prompt, run] > 1e-6
            assert report.logits[0, prompt, run] > 1e-6
    assert report.verdict("as is") == "gap"


@few
@given(orders=several)
def test_the_mask_alone_keeps_the_order(orders: list[list[int]]) -> None:
    """The same two layers without the mask do not know it."""
    report = gap(TWO["pre"], permutations=orders, mask=False)
    assert report.settings.variants == ("mask removed",)
    assert report.logits.max() < EXACT


def test_permutations_that_change_no_id_are_refused(gpt2: Any) -> None:
    """They would count as no gap, whatever the model."""
    equal = torch.full((1, 8), 5)
    with pytest.raises(ValueError, match=r"prompt 0: wanted different .*got 7 times the id"):
        hooks.symmetry_gap(gpt2, equal, progress=False)
    first = torch.tensor([[3, 5, 5, 5, 4]])
    with pytest.raises(ValueError, match="after the first"):
        hooks.symmetry_gap(gpt2, first, keep_first=True, progress=False)
    with pytest.raises(ValueError, match="change the ids of prompt 0; got one that leaves them"):
        gap(gpt2, permutations=[list(range(LENGTH))])
    two = torch.tensor([[1, 2, 3, 4], [5, 5, 6, 4]])
    with pytest.raises(ValueError, match="change the ids of prompt 1"):
        hooks.symmetry_gap(gpt2, two, permutations=[[1, 0, 2, 3]], progress=False)


@few
@given(
    tokens=st.lists(st.integers(0, 2), min_size=4, max_size=7).filter(lambda x: len({*x[1:-1]}) > 1)
)
def test_every_drawn_permutation_changes_the_ids(gpt2: Any, tokens: list[int]) -> None:
    report = hooks.symmetry_gap(
        gpt2, torch.tensor([tokens]), permutations=12, keep_first=True, positions=True, mask=True,
        progress=False,
    )  # fmt: skip
    for order in report.orders[0]:
        assert [tokens[i] for i in order] != tokens
        assert (order[0], order[-1]) == (0, len(tokens) - 1)


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_permutations_are_lists_arrays_or_tensors(gpt2: Any, make: Any) -> None:
    orders = [_backwards(LENGTH), [1, 0, *range(2, LENGTH)]]
    wanted, got = gap(gpt2, permutations=orders), gap(gpt2, permutations=make(orders))
    pd.testing.assert_frame_equal(wanted.to_frame(), got.to_frame(), check_exact=True)
    assert got.settings.seed is None
    with shape_checks_off():
        assert gap(gpt2, permutations=np.int64(2)).settings.permutations == 2


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


@given(n=st.integers(3, 6), floor=st.floats(1e-7, 1e-5), other=st.floats(0, 1e6))
def test_a_chaotic_prompt_hides_no_other(n: int, floor: float, other: float) -> None:
    """A gap of one prompt is one, however large rounding is in another."""
    with shape_checks_off():
        report = gap(GPT2, positions=True, mask=True)
        report = replace(report, **{a: np.repeat(getattr(report, a)[:, :1], n, 1) for a in SIZED})
        gaps = [100 * floor, other, *[floor] * (n - 2)]
        assert judged(report, gaps, [floor, max(other, floor), *[floor] * (n - 2)], 0.5, 0.1) == (
            "gap"
        )


def test_the_verdict_is_as_defined() -> None:
    with shape_checks_off():
        report = gap(GPT2, positions=True, mask=True)
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


# -- twins: the same weights in a model that never had what was removed -------------------------


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


# -- an independent computation -----------------------------------------------------------------

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


# -- neighbours ---------------------------------------------------------------------------------


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


# -- what can't be removed --------------------------------------------------------------------


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


def _backwards(n: int) -> list[int]:
    return [*range(n - 2, -1, -1), n - 1]


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
        ({"permutations": [_backwards(LENGTH)], "keep_first": True}, "and the first in its place"),
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
