"""Results in half precision, on sdpa, with padding and from a device map, against the float64 ones.

The truth is the same model with the same weights, rounded to the dtype, that computes in float64.
Its scores differ from those of the model in the dtype by the model's own rounding, which is
measured here without `hooks`, row by row: delta. What the probe may then report follows:

- a clean maximum p lies where its odds p / (1 - p) are off by at most exp(2 delta), as each score
  is off by at most delta, and p itself is rounded to the dtype;
- the half-width of a row falls with s_t and beta_t and rises with s_*, and the probability that it
  collapses the other way round. So both lie between their values at (s_* + delta, s_t - delta) and
  at (s_* - delta, s_t + delta).

Nothing here is a tolerance to be chosen; in float64 the two ends meet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hooks import NormNoise, UnsupportedModelError, attention_sites, collapse_probe
from hooks.collapse.report import CollapseReport
from hooks.noise.laws import get_law
from hooks.noise.probability import collapse_probability, critical_half_width
from tests.support import builders, models
from tests.support.marks import slowly
from tests.support.watching import shape_checks_off

KINDS = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bloom": "BloomForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SIGMAS = [0.1, 0.2, 0.3, 0.5]
SPARSE = 0.95
ids = models.tokens(3, 24)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shape checks take most of a small probe's time."""
    with shape_checks_off():
        yield


def probe(model: Any, tokens: Any = ids, **options: Any) -> CollapseReport:
    chosen: dict[str, Any] = {"draws": 0, "sigmas": SIGMAS, **options}
    return collapse_probe(model, tokens, progress=False, **chosen)


@functools.cache
def in_dtype(kind: str, dtype: str, attn: str = "eager") -> Any:
    return builders.build(KINDS[kind], attn=attn, dtype=DTYPES[dtype]).model


def build_float64(kind: str, dtype: str) -> Any:
    """The weights of :func:`in_dtype`, computing in float64."""
    model = builders.build(KINDS[kind], dtype=torch.float64).model
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype]).double()
    return model


in_float64 = functools.cache(build_float64)


class Scores(TorchFunctionMode):
    """What each attention of a forward pass takes its softmax of, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.softmax, torch.softmax, Tensor.softmax):
            self.seen.append((args[0] if args else kwargs["input"]).double())
        elif func is functional.scaled_dot_product_attention:
            q, k = (x.double() for x in args[:2])
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            self.seen.append(q @ k.mT * scale)
        return func(*args, **kwargs)

    @classmethod
    def of(cls, model: Any, tokens: Tensor = ids) -> list[Tensor]:
        with cls() as scores, torch.no_grad():
            model(tokens)
        assert all(w.ndim == 4 for w in scores.seen)
        return list(scores.seen)


def alibi(n_heads: int, n_key: int) -> Tensor:
    """BLOOM's bias: 2^(-8 h / n_heads) for each position, h from 1."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, n_heads + 1, dtype=torch.float64) / n_heads)
    return slopes[:, None, None] * torch.arange(n_key, dtype=torch.float64)


@dataclass(frozen=True)
class Bounds:
    """What a report may say of one layer: the least and the most, from float64 scores.

    Rows are those that may be sparse; ``sure`` ones are. ``half_width`` and ``loose`` are
    ``[2, row]`` and ``[2, sigma, row]``, the least and the most.
    """

    head: Tensor
    prompt: Tensor
    query: Tensor
    star: Tensor
    sure: Tensor
    half_width: Tensor
    loose: Tensor


def bounds(w: Tensor, delta: Tensor, eps: float, bias: Tensor | None) -> Bounds:
    """Of one layer, from its scores and each row's largest error in them.

    Args:
        w: float64 scores, ``[prompt, head, query, key]``.
        delta: largest error of a score in each row, ``[prompt, head, query]``.
        eps: of the dtype that the pattern has, and the scores.
        bias: what is added to the q.k part.
    """
    w = w.masked_fill(w < -1e4, -math.inf)
    p = w.softmax(-1).amax(-1)
    odds = p / (1 - p)
    least, most = (odds * f / (1 + odds * f) for f in ((-2 * delta).exp(), (2 * delta).exp()))
    # p is rounded, and so is the threshold that it is held against: eps/2 of each.
    maybe = (most.nan_to_num(1.0) * (1 + eps) >= SPARSE) & (w.isfinite().sum(-1) > 1)
    b, h, q = maybe.nonzero().unbind(1)
    rows, off = w[b, h, q], delta[b, h, q][:, None]
    star = rows.argmax(1, keepdim=True)
    valid = rows.isfinite().scatter(1, star, False)
    gap = rows.gather(1, star)[:, 0] - rows.masked_fill(~valid, -math.inf).amax(1)
    assert (gap > 2 * off[:, 0]).all()  # so no rounding moves a sparse row's arg max, or ties it
    qk = rows if bias is None else rows - bias.expand(w.shape)[b, h, q]
    qk = qk.masked_fill(~rows.isfinite(), 0.0)
    beta, beta_off = None, torch.zeros_like(off)
    if bias is not None:
        # The q.k part is recomputed, in float32: scores are rounded (eps/2) and so is the scale
        # that was fitted to them (eps/2). What a score has more than it is the bias, of two keys.
        rounding = max(eps, torch.finfo(torch.float32).eps) * qk.abs().amax(1, keepdim=True)
        off, beta_off = off + rounding, 2 * rounding
        beta = rows - qk
        beta = (beta.gather(1, star) - beta).nan_to_num(0.0, 0.0, 0.0)
    half_width: list[Tensor] = []
    loose: list[Tensor] = []
    for sign in (-1, 1):
        s_star = (qk.gather(1, star) + sign * off)[:, 0]
        s, shift = qk - sign * off, None if beta is None else beta + sign * beta_off
        a = critical_half_width(s_star, s, shift).masked_fill(~valid, math.inf)
        half_width.append(a.amin(1))
        each = [
            collapse_probability(
                s_star, s, torch.full_like(s_star, sigma), get_law("uniform"), valid=valid,
                beta=shift,
            )
            for sigma in SIGMAS
        ]  # fmt: skip
        loose.insert(0, torch.stack(each))  # a longer reach, a lower probability
    return Bounds(
        h, b, q, star[:, 0], least[b, h, q] * (1 - eps) >= SPARSE, torch.stack(half_width),
        torch.stack(loose),
    )  # fmt: skip


def per_cell(of: Bounds, values: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Sums of values ``[..., row]`` by head, prompt and kind (0 content, 1 sink)."""
    out = np.zeros((*values.shape[:-1], *shape))
    at = (of.head.numpy(), of.prompt.numpy(), (of.star == 0).long().numpy())
    np.add.at(np.moveaxis(out, (-3, -2, -1), (0, 1, 2)), at, np.moveaxis(values.numpy(), -1, 0))
    return out


def assert_within_rounding(
    report: CollapseReport,
    low: list[Tensor],
    true: list[Tensor],
    dtype: str,
    kind: str,
    fused: bool = False,
) -> tuple[float, float]:
    """Every number of the report.

    Returns the most that the loose rate at the largest sigma could have been, in rows, and by what
    factor the least is below that.
    """
    eps = torch.finfo(DTYPES[dtype]).eps
    quadrature = 2e-6  # for one row
    totals = np.zeros((2, len(SIGMAS)))
    assert report.ties.sum() == 0
    for layer, (w_low, w_true) in enumerate(zip(low, true, strict=True)):
        seen = w_true > -1e4
        delta = torch.where(seen, w_low - w_true, 0.0).abs().amax(-1)
        size = float(torch.where(seen, w_true, 0.0).abs().max())
        # Where nothing shows the scores they are computed again, in float32: eight products each.
        delta = delta + 8 * torch.finfo(torch.float32).eps * size * fused
        # Each of the some forty results on a score's way is off by up to eps/2, in any direction.
        assert float(delta.max()) <= 20 * eps * size
        bias = alibi(*w_true.shape[1:4:2]) if kind == "bloom" else None
        of = bounds(w_true, delta, eps, bias)
        rows = report.rows[layer]
        sure, maybe = (
            per_cell(of, x.double(), rows.shape) for x in (of.sure, torch.ones_like(of.sure))
        )
        assert (sure <= rows).all()
        assert (rows <= maybe).all()
        least = per_cell(of, of.loose[0] * of.sure, rows.shape)
        most = per_cell(of, of.loose[1], rows.shape)
        loose = report.loose[:, layer]
        assert (least - quadrature * maybe <= loose).all()
        assert (loose <= most + quadrature * maybe).all()
        totals += np.stack([x.sum((1, 2, 3)) for x in (least, most)])
        _assert_table(report, layer, of)
    return float(totals[1, -1]), float(totals[0, -1] / totals[1, -1])


def _assert_table(report: CollapseReport, layer: int, of: Bounds) -> None:
    table, rows = report.table, np.flatnonzero(report.table.layer == layer)
    place = {
        key: i
        for i, key in enumerate(
            zip(of.head.tolist(), of.prompt.tolist(), of.query.tolist(), strict=True)
        )
    }
    at = [
        place[key]
        for key in zip(
            table.head[rows].tolist(), table.prompt[rows].tolist(), table.query[rows].tolist(),
            strict=True,
        )
    ]  # fmt: skip
    low, high = of.half_width[:, at].numpy()
    one_float32 = 1 + 1e-6  # the table's own
    assert (low <= table.half_width[rows] * one_float32).all()
    assert (table.half_width[rows] <= high * one_float32).all()
    assert np.array_equal(table.key[rows], of.star[at].numpy())
    # A row that surely is sparse and surely can collapse is there.
    wanted = of.sure & (of.half_width[1] < 1)
    assert set(wanted.nonzero()[:, 0].tolist()) <= set(at)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", *slowly("float32", "float16")])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_float64_up_to_the_scores_own_rounding(kind: str, dtype: str) -> None:
    low, true = in_dtype(kind, dtype), in_float64(kind, dtype)
    report = probe(low)
    events, sharp = assert_within_rounding(report, Scores.of(low), Scores.of(true), dtype, kind)
    assert report.n_sparse > 80
    assert events > 10
    # And that says something: the least and the most are not far apart.
    least = {"float64": 1 - 1e-5, "float32": 1 - 1e-4, "float16": 0.9, "bfloat16": 1 / 3}
    assert least[dtype] <= sharp <= 1


# -- attention implementations ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*slowly("float32"), "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_is_within_rounding_too(kind: str, dtype: str) -> None:
    """OPT runs the fused attention, of which no hook shows scores; other bridges their own."""
    low, true = in_dtype(kind, dtype, "sdpa"), in_float64(kind, dtype)
    assert all(site.tapped is (kind == "opt") for site in attention_sites(low))
    report = probe(low)
    events, _ = assert_within_rounding(
        report, Scores.of(low), Scores.of(true), dtype, kind, fused=kind == "opt"
    )
    assert events > 10
    eager = probe(in_dtype(kind, dtype))
    assert (report.examined == eager.examined).all()
    assert (report.single_key == eager.single_key).all()
    if dtype == "float32":
        assert (report.rows == eager.rows).all()
        np.testing.assert_allclose(report.loose, eager.loose, rtol=1e-3, atol=1e-4)


# -- padding ----------------------------------------------------------------------------------

ENCODED = {"bert": "BertForMaskedLM"}
ENCODER_DECODER = {"t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration"}
PROMPTS = [ids[0, :20], ids[1], ids[2, :17]]
DECODED = [ids[1, :9], ids[2, :12], ids[0, :9]]
BEFORE = {"left": (9, 5, 12), "right": (0, 0, 0), "both": (4, 5, 1)}


@functools.cache
def padded_kind(kind: str) -> Any:
    return builders.build({**KINDS, **ENCODED, **ENCODER_DECODER}[kind]).model


def padded(prompts: list[Tensor], before: tuple[int, ...], width: int) -> tuple[Tensor, Tensor]:
    """Token ids and their attention mask; token 5 is no padding by itself."""
    tokens, mask = torch.full((len(prompts), width), 5), torch.zeros(len(prompts), width).long()
    for row, (prompt, first) in enumerate(zip(prompts, before, strict=True)):
        tokens[row, first : first + len(prompt)] = prompt
        mask[row, first : first + len(prompt)] = 1
    return tokens, mask


COUNTS = ("examined", "single_key", "ties", "rows", "level", "loose", "strict", "centred")


def assert_same_report(a: CollapseReport, b: CollapseReport) -> None:
    """To the bit: padding is cut off before the model sees it."""
    for name in COUNTS:
        assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True), name
    for name, values in vars(a.table).items():
        assert np.array_equal(values, getattr(b.table, name)), name
    assert a.tokens == b.tokens


@pytest.mark.parametrize("kind", [*KINDS, *ENCODED, *ENCODER_DECODER])
def test_padded_prompts_are_the_unpadded_ones(kind: str, unchecked: None) -> None:
    model = padded_kind(kind)
    given: dict[str, Any] = {"draws": 1, "sigmas": [0.3], "sparse": 0.9}
    if kind in ENCODER_DECODER:
        given["decoder_tokens"] = [p.tolist() for p in DECODED]
    plain = probe(model, [p.tolist() for p in PROMPTS], **given)
    assert plain.padding.tolist() == [0, 0, 0]
    assert plain.n_sparse > 40
    assert plain.loose.sum() > 0.5
    for before in BEFORE.values():
        tokens, mask = padded(PROMPTS, before, 29)
        if kind == "bart" and any(before):  # it counts positions from the first column
            with pytest.raises(UnsupportedModelError, match="left padding"):
                probe(model, tokens, attention_mask=mask, **given)
            continue
        got = probe(model, tokens, attention_mask=mask, **given)
        assert_same_report(plain, got)
        assert got.padding.tolist() == [9, 5, 12]
    # Without a mask nothing is padding.
    unmasked = probe(model, tokens, layers=[0], **given)
    assert unmasked.padding.tolist() == [0, 0, 0]
    assert unmasked.examined.sum() > plain.examined[0].sum()


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
def test_noise_under_left_padding_is_that_of_the_unpadded_prompts(kind: str) -> None:
    model, noise = padded_kind(kind), NormNoise(sigma=0.3, on="qkv", seed=1)
    tokens, mask = padded(PROMPTS, BEFORE["left"], 29)

    def logits(noised_mask: Tensor | None) -> Tensor:
        hooks = noise.hooks(model, attention_mask=noised_mask)
        with torch.no_grad():
            out: Tensor = model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
        return out

    right, wrong = logits(mask), logits(None)
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            alone = model.run_with_hooks(
                prompt[None], fwd_hooks=noise.hooks(model, first_prompt=row)
            )[0]
            clean = model(prompt[None])[0]
        torch.testing.assert_close(right[row, -len(prompt) :], alone, rtol=1e-3, atol=1e-3)
        assert (wrong[row, -len(prompt) :] - alone).abs().max() > 0.1
        assert (clean - alone).abs().max() > 0.1


def test_noise_under_left_padding_of_an_encoder_and_its_decoder() -> None:
    """T5 knows positions by their distance alone: padding on the left shifts nothing."""
    model, noise = padded_kind("t5"), NormNoise(sigma=0.3, on="qkv", seed=1)
    tokens, mask = padded(PROMPTS, BEFORE["left"], 29)
    decoded, decoded_mask = padded(DECODED, (20, 17, 20), 29)

    def logits(**masks: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = model.run_with_hooks(
                tokens, fwd_hooks=noise.hooks(model, **masks), attention_mask=mask,
                decoder_input_ids=decoded, decoder_attention_mask=decoded_mask,
            )  # fmt: skip
        return out

    both = logits(attention_mask=mask, decoder_attention_mask=decoded_mask)
    wrong = [logits(attention_mask=mask), logits(decoder_attention_mask=decoded_mask)]
    for row, (prompt, start) in enumerate(zip(PROMPTS, DECODED, strict=True)):
        with torch.no_grad():
            alone = model.run_with_hooks(
                prompt[None], fwd_hooks=noise.hooks(model, first_prompt=row),
                decoder_input_ids=start[None],
            )[0]  # fmt: skip
        torch.testing.assert_close(both[row, -len(start) :], alone, rtol=1e-3, atol=1e-3)
        assert all((x[row, -len(start) :] - alone).abs().max() > 0.1 for x in wrong)


# -- ties -------------------------------------------------------------------------------------


def without_positions(dtype: str) -> Any:
    """A GPT-2 to which a token is the same wherever it stands."""
    model = builders.build("GPT2LMHeadModel", dtype=DTYPES[dtype]).model
    with torch.no_grad():
        model.pos_embed.original_component.weight.zero_()
    return model


def distinct(n: int, without: tuple[int, ...] = ()) -> Tensor:
    """Three prompts of n tokens, none of them twice."""
    rows = []
    for seed in range(3):
        order = torch.randperm(models.VOCAB, generator=torch.Generator().manual_seed(seed))
        rows.append(order[~torch.isin(order, torch.tensor(without))][:n])
    return torch.stack(rows)


LOW = 0.25  # a threshold that every dtype has


def tied_and_not(model: Any, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows of layer 0 with a maximum of LOW: those with two maxima up to rounding, and the others.

    Two scores of size w that are rounded apart by eps / 2 each, and their products by as much.
    """
    w = Scores.of(model, tokens)[0]
    w = w.masked_fill(w < -1e4, -math.inf)
    most = w.amax(-1, keepdim=True)
    dtype = next(model.parameters()).dtype
    tied = (w >= most - 2 * torch.finfo(dtype).eps * most.abs()).sum(-1) > 1
    top = w.softmax(-1).to(dtype).amax(-1)
    chosen = (top >= LOW) & (w.isfinite().sum(-1) > 1)
    return (tied & chosen).sum(-1).T.numpy(), (~tied & chosen).sum(-1).T.numpy()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_token_seen_twice_ties_with_itself_in_every_dtype(dtype: str) -> None:
    """[x, x] without positions: each row that looks at what it has seen twice."""
    model, n = without_positions(dtype), 8
    half = distinct(n)
    twice = torch.cat([half, half], 1)
    report = probe(model, twice, layers=[0], sparse=LOW)
    tied, others = tied_and_not(model, twice)
    assert np.array_equal(report.ties[0], tied)
    assert np.array_equal(report.rows[0].sum(-1), others)
    # By construction: row n + i sees tokens 0 to i twice, and has the scores of no other order.
    w = Scores.of(model, twice)[0][:, :, n:, :n]
    once = w.argmax(-1) <= torch.arange(n)
    share = (w.softmax(-1).amax(-1) > 0.9) & once  # at least 0.45 for each of the two
    assert share.sum() > 10
    assert report.ties.sum() >= int(share.sum())
    # A tie has no arg max to lose: nothing of it is in the table.
    table = report.table
    assert not ((table.key + n == table.rival) | (table.rival + n == table.key)).any()


def test_what_only_the_rounding_makes_equal_is_a_tie() -> None:
    """Two tokens whose keys differ in float64 and are one in bfloat16."""
    low, true = without_positions("bfloat16"), build_float64("gpt2", "bfloat16")
    one, other, at, after = 7, 8, (2, 5), slice(5, None)
    small = torch.tensor(1e-3, dtype=torch.bfloat16)
    with torch.no_grad():
        true.pos_embed.original_component.weight.zero_()
        for model in (low, true):
            embedding = model.embed.original_component.weight
            embedding[other] = embedding[one]
            # The last place of a small component: gone in each sum that it enters.
            embedding[one, 0] = small.to(embedding.dtype)
            embedding[other, 0] = (small * (1 + 2**-7)).to(embedding.dtype)
            assert embedding[one, 0] != embedding[other, 0]
    tokens = distinct(24, without=(one, other))
    tokens[:, at[0]], tokens[:, at[1]] = one, other
    w_low, w_true = (Scores.of(m, tokens)[0][:, :, after] for m in (low, true))
    assert (w_low[..., at[0]] == w_low[..., at[1]]).all()
    assert (w_true[..., at[0]] != w_true[..., at[1]]).all()
    rounded, exact = (probe(m, tokens, layers=[0], sparse=LOW) for m in (low, true))

    def between_the_two(report: CollapseReport) -> np.ndarray:
        table = report.table
        pair: np.ndarray = np.isin(table.key, at) & np.isin(table.rival, at)
        return pair

    tied, others = tied_and_not(low, tokens)
    assert tied.sum() > 5
    assert np.array_equal(rounded.ties[0], tied)
    assert np.array_equal(rounded.rows[0].sum(-1), others)
    assert not between_the_two(rounded).any()
    # In float64 these rows have an arg max, which next to no noise moves.
    assert exact.ties.sum() == 0
    assert between_the_two(exact).sum() >= tied.sum() // 2
    assert (exact.table.half_width[between_the_two(exact)] < 1e-2).all()


# -- placed by a device map -------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama on disk, with a tokenizer, as `boot_transformers` wants one."""
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers

    path = tmp_path_factory.mktemp("llama")
    models.tiny_hf(LlamaForCausalLM, models.tiny_llama_config()).save_pretrained(path)
    words = {"[UNK]": 0, "[BOS]": 1, **{f"w{i}": i for i in range(2, models.VOCAB)}}
    inner = Tokenizer(kinds.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="[BOS]", unk_token="[UNK]"
    ).save_pretrained(path)
    return path


MAPS: dict[str, Any] = {"cpu": "cpu", "everything": {"": "cpu"}, "auto": "auto"}


@pytest.mark.parametrize("where", MAPS)
def test_a_device_map_changes_nothing(saved: Path, where: str) -> None:
    plain = probe(TransformerBridge.boot_transformers(str(saved)), draws=2)
    assert plain.n_sparse > 50
    placed = TransformerBridge.boot_transformers(str(saved), device_map=MAPS[where])
    assert_same_report(plain, probe(placed, draws=2))
    hf = AutoModelForCausalLM.from_pretrained(
        saved, device_map=MAPS[where], attn_implementation="eager"
    )
    own = TransformerBridge.boot_transformers(str(saved), hf_model=hf)
    assert_same_report(plain, probe(own, draws=2))


def test_weights_that_are_on_disk_are_measured(saved: Path, tmp_path: Path) -> None:
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    others = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    hf = AutoModelForCausalLM.from_pretrained(
        saved, device_map=layers | others, offload_folder=tmp_path, attn_implementation="eager"
    )
    model = TransformerBridge.boot_transformers(str(saved), hf_model=hf)
    assert any(p.is_meta for p in model.parameters())
    whole = TransformerBridge.boot_transformers(
        str(saved),
        hf_model=AutoModelForCausalLM.from_pretrained(saved, attn_implementation="eager"),
    )
    assert_same_report(probe(whole, draws=2), probe(model, draws=2))
