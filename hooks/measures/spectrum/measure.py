"""Spectral gap: the leading singular values of attention matrices, and the others.

A row-stochastic matrix maps the constant vector onto itself, so its largest singular value is at
least one. Where the others are much smaller, what a head writes has nearly rank one.
Source: Naderi et al. 2024 (arXiv 2410.07799).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.arguments import brief, check_integers, check_optional, read_list
from hooks.errors import UnsupportedModelError
from hooks.measures.spectrum.report import SpectrumReport, SpectrumSettings
from hooks.measures.symmetry import is_centred
from hooks.model import HookedModel, MaskLike, Prompts, Tokens, encode, measurement
from hooks.sites import LayerSites, LayerView, attention_facts, choose_layers, observe, sites_for

_MOST_VALUES = 1 << 16  # singular values: no attention matrix has more that are worth keeping


@measurement
def spectral_gap(
    model: HookedModel,
    tokens: Tokens,
    *,
    k: int = 8,
    lengths: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    decoder_tokens: Tokens | None = None,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
    name: str | None = None,
) -> SpectrumReport:
    """Singular values s_1 >= s_2 >= ... of each head's attention matrix A, and of A - U.

        gap = s_1 - s_2,    stable rank = |A|_F^2 / s_1^2,    U_qt = 1 / |visible keys of q|

    U is the uniform matrix of the same mask (causal, sliding window or none, as the layer's scores
    show it): under a causal mask it has a spectrum of its own, with which A's must be compared. A -
    U is what the fix of :class:`hooks.CentredAttention` leaves; where the model averages with it
    (by itself, or by hooks of that class that are active) the report's summary says so. Without a
    mask U = (1/T) 1 1^T, and a random Markov matrix has s_1 near 1 and its other singular values
    below about 2/sqrt(T) (for entries of unit variance over their mean). One forward pass, one
    layer in memory; singular values in float64. Source: Naderi et al. 2024, arXiv 2410.07799.

    Args:
        model, tokens, decoder_tokens, layers, attention_mask, prepend_bos, name: as in
            :func:`hooks.collapse_probe`.
        batch_size, progress: likewise.
        k: singular values to keep, at least 2.
        lengths: measure each prompt's first n tokens for each n of these, to see the spectrum
            against T; prompts with fewer are left out there. Default: whole prompts.

    Returns:
        :class:`SpectrumReport`.

    Raises:
        UnsupportedModelError: the model failed the self-check; a cross-attention, whose matrix is
            not square; a pattern that holds NaN, or rows that attend to a masked key.
        ValueError: a wrong k, layer or length (longer than every prompt), empty text, a sequence
            longer than the context, or ``lengths`` for inputs other than tokens.
    """
    k, batch_size = check_integers(k=(k, 2, _MOST_VALUES), batch_size=(batch_size, 1))
    cuts = None if lengths is None else _check_lengths(lengths)
    _, progress = check_optional(prepend_bos=prepend_bos, progress=progress)
    prompts = encode(
        model,
        tokens,
        decoder_tokens=decoder_tokens,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    sites = sites_for(model, prompts)
    chosen = choose_layers(sites, layers)
    for layer in chosen:
        if layer.sequence("q") != layer.sequence("k"):
            raise UnsupportedModelError(
                "spectral_gap",
                wanted="attention of a sequence to itself, a square matrix",
                got=f"cross-attention {layer.label} (leave it out with layers=)",
                layer=layer.layer,
            )
    origin = list(range(len(prompts)))
    if cuts is not None:
        prompts, origin = _cut(prompts, cuts)
    gathered = _Gathered(chosen, k)
    observe(
        model,
        chosen,
        prompts,
        gathered.add,
        batch_size=batch_size,
        progress=progress,
        what="spectral gap",
    )
    settings = SpectrumSettings(k=k, lengths=cuts, layers=tuple(s.layer for s in chosen))
    facts = attention_facts(model, sites, chosen, prompts, name)
    facts["centred"] = [s.label for s in chosen if is_centred(model, s)]
    return gathered.report(settings, facts, prompts, origin)


def uniform_of(mask: Bool[Tensor, "*rows key"]) -> Float[Tensor, "*rows key"]:
    """U: each row's visible keys in equal shares, float64; zero where a row sees none."""
    share = mask.double()
    return share / share.sum(-1, keepdim=True).clamp_min(1)


def _check_lengths(lengths: Any) -> tuple[int, ...]:
    """Lengths as a sorted tuple."""
    wanted = "one or more integers in a list"
    given = [check_integers(lengths=(n, 2))[0] for n in read_list("lengths", lengths, wanted)]
    if not given:
        raise ValueError(f"lengths: wanted {wanted}; got none")
    if len(set(given)) < len(given):
        raise ValueError(f"lengths: wanted each once; got {brief(given)}")
    return tuple(sorted(given))


def _cut(prompts: Prompts, lengths: Sequence[int]) -> tuple[Prompts, list[int]]:
    """The first n tokens of each prompt that has as many, and which prompt each was."""
    if prompts.decoder or prompts.each or prompts.joined or prompts.first[0].ndim != 1:
        raise ValueError(
            "lengths: wanted prompts of tokens alone, which can be cut; got images, sound, a "
            "decoder's tokens or other inputs beside them"
        )
    longest = max(len(row) for row in prompts.first)
    if lengths[-1] > longest:
        raise ValueError(
            f"lengths: wanted at most {longest}, the longest prompt's; got {lengths[-1]}"
        )
    pairs = [(i, n) for n in lengths for i, row in enumerate(prompts.first) if len(row) >= n]
    cut = replace(
        prompts,
        first=tuple(prompts.first[i][:n] for i, n in pairs),
        padding=tuple(prompts.padding[i] for i, _ in pairs),
        strings=tuple(prompts.strings[i][:n] for i, n in pairs),
    )
    return cut, [i for i, _ in pairs]


class _Gathered:
    """Singular values of each layer, prompt by prompt."""

    def __init__(self, layers: Sequence[LayerSites], k: int) -> None:
        self.k = k
        self._pieces: list[dict[int, dict[str, np.ndarray]]] = [{} for _ in layers]
        self._uniform: dict[bytes, np.ndarray] = {}  # by mask: most layers share one

    def add(self, view: LayerView) -> None:
        """One layer of one batch."""
        pattern, mask = view.pattern.double(), view.visible
        self._check(view, pattern, mask)
        left = pattern - uniform_of(mask)
        found = {
            "singular": self._leading(torch.linalg.svdvals(pattern)),
            "left": self._leading(torch.linalg.svdvals(left)),
            "square": pattern.square().sum((-2, -1)).cpu().numpy(),
            "left_square": left.square().sum((-2, -1)).cpu().numpy(),
        }
        for row, prompt in enumerate(view.prompts):
            piece = {name: values[row] for name, values in found.items()}
            piece["uniform"] = np.stack([self._of_mask(of_head) for of_head in mask[row]])
            piece["length"] = np.full(1, pattern.shape[-1])
            self._pieces[view.index][prompt] = piece

    def _check(self, view: LayerView, pattern: Tensor, mask: Tensor) -> None:
        layer = view.sites.layer
        if not bool(torch.isfinite(pattern).all()):
            raise UnsupportedModelError(
                "spectral_gap",
                wanted="finite numbers as attention weights",
                got="an infinite one or NaN",
                layer=layer,
            )
        masked = float(pattern.masked_fill(mask, 0.0).abs().max())
        if masked > 0:
            got = f"a weight of {masked:.2g}"
            raise UnsupportedModelError(
                "spectral_gap", wanted="no attention to masked keys", got=got, layer=layer
            )

    def _leading(self, values: Float[Tensor, "*heads n"]) -> np.ndarray:
        """The k largest; NaN after the last, where the matrix has fewer."""
        some = values[..., : self.k].cpu().numpy()
        room = [(0, 0)] * (some.ndim - 1) + [(0, self.k - some.shape[-1])]
        return np.pad(some, room, constant_values=np.nan)

    def _of_mask(self, mask: Bool[Tensor, "query key"]) -> np.ndarray:
        """Leading singular values of the uniform matrix of a mask."""
        key = np.packbits(mask.cpu().numpy()).tobytes() + bytes(f"{list(mask.shape)}", "ascii")
        if key not in self._uniform:
            self._uniform[key] = self._leading(torch.linalg.svdvals(uniform_of(mask)))
        return self._uniform[key]

    def report(
        self,
        settings: SpectrumSettings,
        model: Mapping[str, Any],
        prompts: Prompts,
        origin: Sequence[int],
    ) -> SpectrumReport:
        """All prompts in their order."""

        def of(name: str) -> tuple[np.ndarray, ...]:
            return tuple(
                np.stack([pieces[i][name] for i in range(len(prompts))]) for pieces in self._pieces
            )

        return SpectrumReport(
            settings=settings,
            model=model,
            tokens=prompts.strings,
            decoder_tokens=prompts.decoder_strings,
            prompt=np.asarray(origin, dtype=np.int32),
            length=tuple(x[:, 0].astype(np.int32) for x in of("length")),
            singular=of("singular"),
            uniform=of("uniform"),
            left=of("left"),
            square=of("square"),
            left_square=of("left_square"),
        )
