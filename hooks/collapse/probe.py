"""The collapse probe: which sparse attention rows lose their token, at which norm noise.

Protocol of Menary et al. 2024, Fig. 3: noise in each layer on its own, on clean inputs; a row whose
clean maximum is at least 0.95 collapses when its arg max moves. Clean inputs make the noisy scores
a function of the clean ones, so one forward pass holds every answer: each layer is reduced to its
counts while its scores exist, then freed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from hooks.arguments import (
    MANY,
    brief,
    check_booleans,
    check_choice,
    check_integers,
    check_number,
    check_optional,
)
from hooks.collapse.report import CollapseReport
from hooks.collapse.settings import ProbeSettings
from hooks.collapse.tally import Tally
from hooks.model import (
    Fused,
    HookedModel,
    MaskLike,
    ModelInput,
    Prompts,
    Tokens,
    encode,
    input_device,
    measurement,
    over_batches,
    tell,
)
from hooks.noise import LAWS, SPARSE, NormNoise, Shared, read_sigmas
from hooks.sites import (
    LayerSites,
    SeenLayer,
    attention_facts,
    choose_layers,
    may_share,
    qk_part,
    sites_and_key,
    watch_layers,
)

if TYPE_CHECKING:
    from hooks.collapse.device import DeviceReducer

DEFAULT_SIGMAS = (
    0.01, 0.015, 0.02, 0.03, 0.04, 0.055, 0.075, 0.1, 0.11, 0.14, 0.17, 0.2, 0.25, 0.3, 0.4, 0.5,
)  # fmt: skip

KEEP = 1 << 19
"""Competitors that a report's table has room for: some 10 MiB, whatever the model."""
KEEP_ROWS = 16
"""Rows, the most fragile ones, whose attention a report keeps before and after noise."""
_BLOCK_BYTES = 1 << 24
_PROMPTS, _TOKENS = 8, 1024  # of a pass: so many prompts, more where they are short

Method = Literal["exact", "sample"]
Engine = Literal["auto", "compiled", "torch", "triton"]


@measurement
def collapse_probe(
    model: HookedModel,
    tokens: Tokens,
    *,
    decoder_tokens: Tokens | None = None,
    sigmas: Sequence[float] | None = None,
    on: str = "qk",
    method: Method = "exact",
    law: str = "uniform",
    shared: Shared = "none",
    layers: Sequence[int] | None = None,
    sparse: float = SPARSE,
    strict: bool = True,
    draws: int | None = None,
    seed: int = 0,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int | None = None,
    keep: int = KEEP,
    keep_rows: int = KEEP_ROWS,
    query_block: int | None = None,
    first_prompt: int = 0,
    engine: Engine = "auto",
    progress: bool | None = None,
    name: str | None = None,
) -> CollapseReport:
    """Share of sparse attention rows whose arg max moves under norm noise, by sigma, layer, head.

    Under noise on the vectors that enter the dot product a row's scores become
    (1 + kq)(1 + k_t) s_t + b_t, exactly. ``exact`` computes the probability that the arg max moves
    from the clean scores, and the strict rate (the new maximum is again >= ``sparse``) with bounds;
    ``sample`` draws the noise of :class:`NormNoise` and counts. Source: Menary et al. 2024, Fig. 3
    and theorem 7.

    Args:
        model: a TransformerBridge (or anything that can be called and has ``cfg``, ``hook_dict``,
            ``hooks`` and ``run_with_hooks``). Left as found; probed in eval mode.
        tokens: a text, several texts, token ids ``[pos]`` or ``[batch, pos]``, or a list of ids;
            pixel values or wave forms where the model reads those; or named inputs, such as
            ``{"input_ids": ..., "pixel_values": ...}``.
        decoder_tokens: what an encoder-decoder's decoder reads, one for each prompt; default:
            its start token and the prompt itself, as in denoising.
        sigmas: RMS of the relative change of a norm; default: 16 from 1% to 50%, as far as the law
            goes.
        on: noised vectors, any of ``"q"``, ``"k"``, ``"v"``.
        method: ``"exact"`` or ``"sample"``.
        law: ``"uniform"``, ``"gaussian"`` or ``"lognormal"``.
        shared: which vectors share a factor in sampled rates (see :class:`NormNoise`); a row's own
            probability does not depend on it.
        layers: block indices; default: every attention layer.
        sparse: least maximum of a sparse row.
        strict: compute the strict rate under ``"exact"``; it costs more the more rows collapse.
        draws: samples of the noise; under ``"exact"``, of the strict rate only, to check what is
            computed (or, for ``sparse`` <= 0.5, to have one at all). Default: none under
            ``"exact"``, 16 under ``"sample"``.
        seed: of the noise.
        attention_mask: 1 for real tokens. Without it, the tokenizer's pad tokens at either end of a
            row of a tensor are padding, unless they are also its first or last token (bos, eos);
            lists of ids are taken as they are.
        prepend_bos: passed on to ``model.to_tokens``; with text only.
        batch_size: prompts per forward pass; default: 8, or as many short ones as have 1,024 tokens
            together. Prompts of different lengths share a pass, the shorter ones padded at the end,
            if none has over 512 tokens, no hook of yours is on the model, and it computes the same
            scores for the longest and the shortest of them together as alone (tried on the model);
            else only prompts of one length do.
        keep: how many competitors the report's table holds, those nearest to winning; ``sigma_at``
            and ``fragile`` are computed from them.
        keep_rows: how many of the most fragile rows the report keeps with their attention before
            and after noise (:class:`hooks.KeptRows`).
        query_block: where a fused attention makes no scores, they are made for this many queries at
            a time, never as one [query, key] matrix; default: as many as fit into 16 MiB.
        first_prompt: index of the first prompt: parts of a corpus, each probed with the index at
            which it starts, draw the noise of the whole and :meth:`CollapseReport.merge` exactly.
        engine: what reduces a layer's scores: ``"compiled"`` code on the CPU; ``"torch"`` on the
            device where they lie, from which only the result is copied; ``"triton"``: the same,
            with kernels of its own, for CUDA; ``"auto"``: compiled on the CPU, and where the
            others do not compute what is asked (draws, and the strict rate under other laws than
            uniform, of noise on q alone and under soft caps); Triton on CUDA, where it is installed
            and its sums on made-up rows are torch's there, which is tried once; else torch. The
            report's ``model["engine"]`` says which ran; parts of several may be merged.
        progress: show a bar in a terminal or a notebook, lines in a log; default: in a log only
            after a minute.
        name: what the report calls the model; default: the model's own name.

    Returns:
        :class:`CollapseReport`.

    Raises:
        UnsupportedModelError: the model failed the self-check.
        ValueError: empty text, a sequence longer than the context or of one token, a sigma that the
            law can't have, an unknown layer, site, law or method.
    """
    options = read_options(
        sigmas=sigmas,
        on=on,
        method=method,
        law=law,
        shared=shared,
        layers=layers,
        sparse=sparse,
        strict=strict,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        keep=keep,
        keep_rows=keep_rows,
        query_block=query_block,
        engine=engine,
    )
    (first_prompt,) = check_integers(first_prompt=(first_prompt, 0))
    _, progress = check_optional(prepend_bos=prepend_bos, progress=progress)
    prompts = encode(
        model,
        tokens,
        decoder_tokens=decoder_tokens,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    sites, key = sites_and_key(model, prompts)
    chosen = choose_layers(sites, options.layers)
    settings = replace(options.settings, layers=tuple(s.layer for s in chosen))
    tally = Tally(settings, chosen, len(prompts), first_prompt, prompts.starts)
    padded = may_share(model, chosen, prompts, key)
    ran = count(model, prompts, tally, options, padded=padded, progress=progress)
    facts = attention_facts(model, sites, chosen, prompts, name) | {"engine": ran}
    return tally.report(model=facts, prompts=prompts)


@dataclass(frozen=True)
class Options:
    """Checked options of a probe; ``settings`` has no layers yet."""

    settings: ProbeSettings
    noise: NormNoise
    layers: Sequence[int] | None
    batch_size: int | None
    query_block: int | None
    engine: Engine

    def together(self, prompts: Prompts | None) -> int:
        """How many prompts share a pass, of these prompts or of any."""
        if self.batch_size is not None:
            return self.batch_size
        lengths = () if prompts is None else prompts.lengths
        return max(_PROMPTS, _TOKENS // max(lengths, default=_TOKENS))


def read_options(
    *,
    sigmas: Sequence[float] | None = None,
    on: str = "qk",
    method: Method = "exact",
    law: str = "uniform",
    shared: Shared = "none",
    layers: Sequence[int] | None = None,
    sparse: float = SPARSE,
    strict: bool = True,
    draws: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    keep: int = KEEP,
    keep_rows: int = KEEP_ROWS,
    query_block: int | None = None,
    engine: Engine = "auto",
    pooled: bool = False,
) -> Options:
    """Options of :func:`collapse_probe`, checked.

    Raises:
        TypeError, ValueError: one that no probe could have.
    """
    # Compiled code: whoever only injects noise needs none.
    from hooks.kernels import LAW_CODES

    asked: Any = law
    if isinstance(asked, str) and law not in LAW_CODES and law in LAWS:
        raise ValueError(
            f"law: wanted one of {sorted(LAW_CODES)}, whose probabilities are compiled; got "
            f"{law!r} (NormNoise, sweep and collapse_probability take laws of your own)"
        )
    values = read_grid(sigmas, law)
    method = cast(Method, check_choice("method", method, get_args(Method)))
    engine = cast(Engine, check_choice("engine", engine, get_args(Engine)))
    noise = NormNoise(sigma=values[0], on=on, law=law, shared=shared, seed=seed)
    sparse = check_sparse(sparse)
    least, usual = (2, 16) if method == "sample" else (0, 0)
    draws, batch, keep, keep_rows, block = check_integers(
        draws=(usual if draws is None else draws, least, MANY),
        batch_size=(_PROMPTS if batch_size is None else batch_size, 1),
        keep=(keep, 1),
        keep_rows=(keep_rows, 0),
        query_block=(1 if query_block is None else query_block, 1),
    )
    settings = ProbeSettings(
        sigmas=values,
        on="".join(noise.roles),
        law=noise.law,
        method=method,
        shared=noise.shared,
        sparse=sparse,
        layers=(),
        draws=draws,
        seed=noise.seed,
        keep=keep,
        keep_rows=keep_rows,
        strict=_how(strict, method, sparse),
        pooled=pooled,
    )
    query_block = None if query_block is None else block
    together = None if batch_size is None else batch
    return Options(settings, noise, layers, together, query_block, engine)


def count(
    model: HookedModel,
    prompts: Prompts,
    tally: Tally,
    options: Options,
    *,
    padded: bool = False,
    progress: bool | None,
) -> str:
    """Add the rows of all prompts to the tally, in passes of ``options.batch_size`` prompts.

    ``padded``: prompts of different lengths share a pass, as :func:`hooks.sites.may_share` allows.

    Returns:
        Which engines reduced them.
    """
    from hooks.collapse.device import Engines
    from hooks.collapse.reduce import Workers

    tell_if_compiling(model, options.engine, progress)
    with Workers().open() as workers:
        engines = Engines(tally, options.noise, options.engine, workers)

        def measure(indices: Sequence[int], given: ModelInput) -> None:
            watch = partial(watch_layers, model, given, tally.layers)
            ends = [len(prompts.first[i]) for i in indices] if padded else []
            padding = _Padding(ends) if len({*ends}) > 1 else None
            reduce = partial(_reduce, query_block=options.query_block, padding=padding)
            engines.each_layer(indices, watch, reduce)

        over_batches(
            model,
            prompts,
            options.together(prompts),
            measure,
            what="collapse probe",
            progress=progress,
            padded=padded,
        )
    return engines.name


def tell_if_compiling(model: HookedModel, engine: str, progress: bool | None) -> None:
    """Say so where code has to be compiled first, which later runs find on disk."""
    from hooks.kernels import is_ready, scan

    compiles = engine == "compiled" or (engine == "auto" and input_device(model).type == "cpu")
    if compiles and not is_ready(scan):
        tell("collapse probe: compiling for this processor, once, a minute or two", progress)


class _Padding:
    """The rows of a pass that are padding: no key is visible to them, so none is counted."""

    def __init__(self, ends: Sequence[int]) -> None:
        self._ends = torch.tensor(ends)

    def lengths(self, device: torch.device) -> Tensor:
        """How many rows of each prompt are none."""
        return self._ends.to(device)

    def hide(self, scores: Tensor, first: int = 0) -> Tensor:
        """Scores of the rows from query ``first`` on, without those of padding."""
        self._ends = self.lengths(scores.device)
        queries = torch.arange(first, first + scores.shape[2], device=scores.device)
        rows = queries >= self._ends[:, None]
        return scores.masked_fill(rows[:, None, :, None], -math.inf)


def read_grid(sigmas: Sequence[float] | None, law: str) -> tuple[float, ...]:
    """The sigmas of a probe, at least one.

    Raises:
        TypeError, ValueError: not a list of numbers, an empty one, or a sigma that the law can't
            have.
    """
    values = read_sigmas(sigmas, law, DEFAULT_SIGMAS)
    if not values:
        raise ValueError("sigmas: wanted one or more; got none")
    if values != sorted(set(values)):
        raise ValueError(f"sigmas: wanted ascending and distinct; got {brief(values)}")
    return tuple(values)


def _how(strict: bool, method: Method, sparse: float) -> str:
    """How the strict rate is found: computed or, also where several tokens can win, sampled."""
    (wanted,) = check_booleans(strict=strict)
    return "computed" if wanted and method == "exact" and sparse > 0.5 else "sampled"


def check_sparse(sparse: float) -> float:
    """The maximum from which a row counts as sparse.

    Raises:
        ValueError: not in (0, 1].
    """
    return check_number("sparse", sparse, "a maximum in (0, 1]", lambda x: 0 < x <= 1)


def _reduce(
    seen: SeenLayer, reducer: DeviceReducer, query_block: int | None, padding: _Padding | None
) -> None:
    """Count one layer's rows; with q and k apart where a bias is added to their product."""
    sites, fused = seen.sites, None if seen.taken is None else seen.taken.fused
    if fused is not None and reducer.takes(fused, padded=padding is not None):
        lengths = None if padding is None else padding.lengths(fused.query.device)
        reducer.add_fused(fused, query_block, _BLOCK_BYTES, lengths)
        return
    vectors = None
    if sites.has_bias:
        of = seen.vectors()
        wide = torch.promote_types(of["q"].dtype, torch.float32)
        vectors = of["q"].to(wide), of["k"].to(wide)
    if fused is not None:
        _in_blocks(reducer, sites, fused, vectors, query_block, padding)
        return
    s = None if vectors is None else qk_part(sites, *vectors)
    scores, pattern = seen.scores_and_pattern()
    if padding is not None:
        scores = padding.hide(scores)
    reducer.add(scores, pattern, s)


def _in_blocks(
    reducer: DeviceReducer,
    sites: LayerSites,
    fused: Fused,
    vectors: tuple[Tensor, Tensor] | None,
    query_block: int | None,
    padding: _Padding | None,
) -> None:
    """Scores in blocks of queries, so that no [query, key] matrix is ever made."""
    batch, n_heads, n_query, n_key = fused.shape
    fits = _BLOCK_BYTES // (4 * batch * n_heads * n_key)
    block = max(1, fits) if query_block is None else query_block
    square = fused.is_causal and n_query == n_key
    for first in range(0, n_query, block):
        end = min(first + block, n_query)
        seen = end if square else n_key  # later keys are masked for all of these
        s = None
        if vectors is not None:
            q, k = vectors
            s = qk_part(sites, q[:, first:end], k[:, :seen])
        scores = fused.scores(first, end, n_key=seen)
        if padding is not None:
            scores = padding.hide(scores, first)
        eps = torch.finfo(fused.query.dtype).eps
        reducer.add(scores, None, s, first_query=first, n_query=n_query, n_key=n_key, eps=eps)
