"""Cache formats: the bits of the libraries, and laws of what comes out of a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from hooks.measures.cache import (
    GGML,
    HQQ,
    KIVI,
    CacheFormat,
    Float8,
    Full,
    Quanto,
    TransformersFloat8,
    kinds,
    read_format,
    stored,
    text_of,
)
from hooks.measures.cache.affine import between
from hooks.measures.cache.formats import ROLES
from hooks.measures.cache.ggml import blocks, hadamard, rotation
from tests.support.caches import WIDTHS, against_transformers, vectors

EVERY: tuple[CacheFormat, ...] = (
    Full(),
    Float8(),
    Float8("e5m2", 0.5),
    TransformersFloat8(),
    TransformersFloat8(first=3),
    GGML("q8_0"),
    GGML("q5_0", rotated=False),
    GGML("q4_0", paired=False),
    Quanto(),
    Quanto(2, group=32, axis_key=-1, window=8),
    HQQ(),
    HQQ(2, axis_value=1),
    KIVI(),
    KIVI(2, window=64),
)
forms = st.sampled_from(EVERY)


# -- the libraries ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block", ["q8_0", "q5_0", "q4_0"])
def test_blocks_are_ggufs_to_the_bit(block: str, width: int) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[block.upper()]
    x = vectors(300, width) * torch.linspace(-6, 6, 300).exp()[:, None]
    x[7], x[11] = 0, 1  # a block without a scale; ties
    if GGML(block).refusal("k", 1, 300, width):
        with pytest.raises(gguf.quants.QuantError):
            gguf.quants.quantize(x.numpy(), kind)
        return
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    np.testing.assert_array_equal(blocks(x, block).numpy(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_8_bit_store_is_transformers_to_the_bit(dtype: torch.dtype) -> None:
    """quanto's and HQQ's are held against theirs in `tests/caches`."""
    from transformers.cache_utils import Fp8QuantizedLayer

    assert against_transformers(Fp8QuantizedLayer, TransformersFloat8(), dtype) == 21 * 24


def test_vllms_float8_is_torchs_cast() -> None:
    """Saturating for e4m3, infinite for e5m2: what a scale of 1 does to large keys."""
    x = torch.tensor([[[[0.3, 447.0, 1e5, -torch.inf]]]])
    assert torch.equal(stored(Float8(), "k", x), x.to(torch.float8_e4m3fn).float())
    assert stored(Float8(), "k", x)[..., 1:].tolist() == [[[[448.0, 448.0, -448.0]]]]
    assert stored(Float8("e5m2"), "k", x)[0, 0, 0, 2] == torch.inf


# -- laws -------------------------------------------------------------------------------------


@given(forms, st.integers(0, 5))
def test_a_format_is_its_text(form: CacheFormat, seed: int) -> None:
    again = read_format(text_of(form))
    assert again == form
    x = vectors(1, 2, 64, 64, seed=seed)
    assert torch.equal(stored(form, "k", x), stored(again, "k", x))


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_is_the_default_of_its_text(kind: str) -> None:
    form = read_format(kind)
    assert form.kind == kind == text_of(form)
    for role in ROLES:
        assert 2 < form.bits(role, 64) <= 16


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("form", EVERY, ids=text_of)
def test_rows_of_a_batch_have_caches_of_their_own(form: CacheFormat, role: Any) -> None:
    x = vectors(3, 2, 64, 64)
    both = stored(form, role, x)
    assert torch.equal(both, torch.cat([stored(form, role, row) for row in x.split(1)]))
    assert both.shape == x.shape
    assert both.dtype == x.dtype


@given(st.sampled_from([f for f in EVERY if isinstance(f, Full | Float8 | GGML)]), st.data())
def test_formats_without_a_memory_do_not_depend_on_the_pieces(form: Any, data: Any) -> None:
    x = vectors(1, 2, 12, 64, seed=data.draw(st.integers(0, 9)))
    cut = data.draw(st.integers(1, 11))
    store = form.store("k")
    store.append(x[:, :, :cut])
    read = store.append(x[:, :, cut:])
    assert torch.equal(read, stored(form, "k", x))
    assert torch.equal(read, store.read())


@pytest.mark.parametrize("role", ROLES)
def test_kivi_steps_give_what_the_whole_prompt_gives(role: Any) -> None:
    """Its groups are fixed by position: a prompt written token by token ends in the same store."""
    form, x = KIVI(2, group=32, window=64), vectors(1, 2, 200, 64)
    store = form.store(role)
    for token in x.split(1, dim=2):
        store.append(token)
    assert torch.equal(store.read(), stored(form, role, x))


def test_kivi_keeps_its_window() -> None:
    form, x = KIVI(2, group=32, window=64), vectors(1, 2, 200, 64)
    kept = {role: (stored(form, role, x) == x).all(-1).all(1)[0] for role in ROLES}
    assert kept["k"].tolist() == [False] * 192 + [True] * 8  # 200 mod 64
    assert kept["v"].tolist() == [False] * 136 + [True] * 64  # all but the last 64


@given(st.integers(1, 8), st.integers(0, 99))
def test_integers_between_are_exact_on_their_grid(bits: int, seed: int) -> None:
    """Numbers low + i s with both ends among them come back as they were."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(2**bits, (5, 16), generator=generator)
    q[:, 0], q[:, 1] = 0, 2**bits - 1
    x = q * 0.25 - 3.0
    assert torch.equal(between(x, bits), x)
    error = (between(x + 0.1 * torch.rand(5, 16, generator=generator), bits) - x).abs()
    assert float(error.max()) <= 0.25 + 0.1


@given(forms, st.integers(0, 9))
def test_errors_scale_with_the_vectors(form: CacheFormat, seed: int) -> None:
    """Times 4, up to the float's own range: nothing but the scale of 8-bit floats is absolute."""
    if isinstance(form, Float8 | HQQ):  # HQQ shrinks errors by an absolute amount
        return
    x = vectors(1, 2, 64, 64, seed=seed)
    assert torch.equal(stored(form, "v", 4 * x), 4 * stored(form, "v", x))


def test_the_rotation_is_its_own_inverse() -> None:
    for n in (1, 64, 128):
        torch.testing.assert_close(hadamard(n) @ hadamard(n), torch.eye(n))
    assert [rotation("k", d) for d in (64, 80, 128, 192, 256)] == [64, 1, 128, 64, 256]
    assert {rotation("v", d) for d in (64, 128, 256)} == {64}


def test_a_rotated_store_is_that_of_the_rotated_paired_vectors() -> None:
    """Pairs (i, i + d/2) side by side, then Sylvester's signs: by indices, not by matrices."""
    x = vectors(1, 1, 9, 64)
    signs = torch.tensor(
        [[1 - 2 * (bin(i & j).count("1") % 2) for i in range(64)] for j in range(64)]
    )
    pairs = [i // 2 + 32 * (i % 2) for i in range(64)]
    turned = x[..., pairs] @ (signs / 8.0)
    back = blocks(turned, "q4_0") @ (signs / 8.0)
    wanted = torch.empty_like(x)
    wanted[..., pairs] = back
    torch.testing.assert_close(stored(GGML("q4_0"), "k", x), wanted)
    plain = GGML("q4_0", rotated=False, paired=False)
    assert torch.equal(stored(plain, "k", x), blocks(x, "q4_0"))


def test_quantos_axis_minus_1_mixes_heads() -> None:
    """Sixteen times larger keys in head 1 change what head 0 gets back, unless 64 divides."""
    form = Quanto(axis_key=-1)
    for length, mixes in ((96, True), (128, False)):
        x = vectors(1, 2, length, 64)
        louder = x.clone()
        louder[:, 1] *= 16
        same = torch.equal(stored(form, "k", x)[:, 0], stored(form, "k", louder)[:, 0])
        assert same != mixes
    lengths = [n for n in range(1, 257) if not form.refusal("k", 3, n, 64)]
    assert lengths == [64, 128, 192, 256]


def test_transformers_float8_keeps_its_first_scale() -> None:
    """A tiny first token is the ceiling for all others."""
    x = vectors(1, 2, 8, 64)
    x[:, :, 0] *= 0.01
    most = x[:, :, 0].abs().max()
    late = stored(TransformersFloat8(first=1), "v", x)
    torch.testing.assert_close(late.abs().max(), most)
    assert stored(TransformersFloat8(), "v", x).abs().max() > 50 * most


def test_hqqs_store_is_quantised_again_and_quantos_does_not_grow() -> None:
    """Seven flushes of 8: the prompt's own error."""
    grown = {}
    for form in (HQQ(window=8), Quanto(window=8)):
        x = vectors(1, 2, 64, 64)
        store = form.store("k")
        store.append(x)
        before = float((store.read() - x).norm())
        for i in range(56):
            store.append(vectors(1, 2, 1, 64, seed=i + 1))
        grown[form.kind] = float((store.read()[:, :, :64] - x).norm()) / before
    assert grown["hqq-int4"] > 1.5
    assert grown["quanto-int4"] == pytest.approx(1, abs=1e-4)


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "shape", "says"),
    [
        (
            GGML("q4_0"),
            (1, 2, 8, 80),
            "q4_0: wanted a multiple of 32, the block, as channels; got 80",
        ),
        (KIVI(), (1, 2, 8, 80), "wanted a multiple of 32, the group, as channels; got 80"),
        (Quanto(), (1, 3, 5, 80), "heads x tokens x channels; got 1200"),
        (Quanto(axis_value=-1), (1, 3, 5, 80), "heads x tokens; got 15"),
        (HQQ(), (1, 3, 5, 80), "heads x tokens x channels; got 1200"),
    ],
    ids=str,
)
def test_what_a_library_refuses_is_refused_by_name(
    form: CacheFormat, shape: tuple[int, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=f"formats: .*{says}"):
        stored(form, "v", vectors(*shape))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Quanto(8), r"nbits: wanted one of \[2, 4\], what transformers' quanto cache has"),
        (lambda: HQQ(3), "nbits: wanted one of"),
        (lambda: KIVI(window=40), "window: wanted a multiple of the group 32; got 40"),
        (lambda: GGML("q4_K"), "block: wanted one of"),
        (lambda: Float8("e3m4"), "dtype: wanted one of"),
        (lambda: Float8(scale=0.0), "scale: wanted a number above 0"),
        (lambda: read_format("q4_1"), "formats: wanted one of .*did you mean 'q4_0'"),
        (lambda: read_format("q4_0 rotated=maybe"), "formats: wanted one of"),
        (lambda: read_format("kivi-int4 group=x"), "formats: wanted a number; got 'x'"),
        (lambda: read_format("q8_0 bits=3"), "formats: wanted a field of q8_0; got 'bits=3'"),
    ],
)
def test_wrong_formats_are_named(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
