"""Cache risk: what a quantised key/value cache costs, layer by layer, from one pass.

Each layer's keys and values go through every format as they enter the dot product. What that does
to the layer's own scores is exact; what it costs the output follows to second order from gradients
(:mod:`hooks.measures.cache.fisher`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from hooks.arguments import MANY, SEEDS, check_integers, check_optional
from hooks.collapse import check_sparse
from hooks.errors import UnsupportedModelError
from hooks.measures.cache.affine import KIVI
from hooks.measures.cache.errors import ScoreRows, direction_error, first_tokens_of, norm_error
from hooks.measures.cache.fisher import Gradients, draw_seeds, risk_of
from hooks.measures.cache.formats import (
    ROLES,
    CacheFormat,
    CacheRole,
    read_format,
    read_formats,
    stored,
    text_of,
)
from hooks.measures.cache.report import CacheRisk, CacheSettings
from hooks.model import (
    HookedModel,
    MaskLike,
    ModelInput,
    Prompts,
    Tokens,
    encode,
    measurement,
    over_batches,
)
from hooks.noise import SPARSE
from hooks.sites import (
    LayerSites,
    LayerView,
    attention_facts,
    choose_layers,
    sites_for,
    view_layers,
)

DEFAULT_FORMATS: Final = (
    "fp8-e4m3",
    "fp8-e5m2",
    "transformers-fp8",
    "q8_0",
    "q5_0",
    "q4_0",
    "quanto-int4",
    "hqq-int4",
    "kivi-int4",
    "kivi-int2",
    "quanto-int2",
)
"""What :func:`hooks.cache_risk` measures, where the model's heads allow it."""


@measurement
def cache_risk(
    model: HookedModel,
    tokens: Tokens,
    *,
    formats: Sequence[str | CacheFormat] | str | CacheFormat | None = None,
    samples: int = 2,
    layers: Sequence[int] | None = None,
    sparse: float = SPARSE,
    seed: int = 0,
    decoder_tokens: Tokens | None = None,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    first_prompt: int = 0,
    progress: bool | None = None,
    name: str | None = None,
) -> CacheRisk:
    """What each format of a key/value cache costs in each layer, and how its keys and values err.

        risk = 1/2 sum_t E[(g_t . (x'_t - x_t))^2]

    in nats, where x'_t is what the format gives back for a key or value x_t and g_t the gradient of
    the logits along random vectors whose mean square is their Fisher information diag(p) - p p^T:
    KL(clean || cached) to second order, for a cache in this one layer. One pass, and one backward
    pass per sample, for all layers and formats together. Errors of norms, directions and scores are
    exact, and so are the sparse rows whose arg max moves. Each prompt is written to a cache of its
    own, all at once, and read when it is whole.

    Args:
        model, tokens, decoder_tokens, layers, attention_mask, prepend_bos, name: as in
            :func:`hooks.collapse_probe`.
        batch_size, progress: likewise. With samples, activations of a whole pass are kept, and the
            errors of all keys and values, for each format: take fewer prompts or formats at a time
            if memory is short.
        formats: names such as ``"q4_0"`` or ``"quanto-int4 group=32"``, or the classes of
            :mod:`hooks.measures.cache`. Default: those of ``DEFAULT_FORMATS`` that store the
            model's heads; the report names the others.
        samples: random vectors at each position, each a backward pass; 0: no risk, and no
            gradients.
        sparse: least maximum of a sparse row.
        seed: of the random vectors.
        first_prompt: index of the first prompt, where this is part of a corpus: see
            :meth:`CacheRisk.merge`.

    Returns:
        :class:`CacheRisk`.

    Raises:
        UnsupportedModelError: the model failed the self-check; scores that q and k do not give
            (positions rotated in behind the hooks); queries that attend to later tokens; with
            samples, a model without logits, or one whose keys no gradient reaches.
        ValueError: an unknown format, or one that refuses the model's heads or a prompt's length.
    """
    sparse = check_sparse(sparse)
    samples, seed, batch_size, first_prompt = check_integers(
        samples=(samples, 0, MANY),
        seed=(seed, 0, SEEDS),
        batch_size=(batch_size, 1),
        first_prompt=(first_prompt, 0),
    )
    _, progress = check_optional(prepend_bos=prepend_bos, progress=progress)
    some = None if formats is None else read_formats(formats)
    prompts = encode(
        model,
        tokens,
        decoder_tokens=decoder_tokens,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    sites = sites_for(model, prompts)
    chosen = choose_layers(sites, layers)
    run = _Run(model, chosen, prompts, some, sparse, (seed, first_prompt, samples))
    over_batches(model, prompts, batch_size, run.batch, what="cache risk", progress=progress)
    facts = attention_facts(model, sites, chosen, prompts, name)
    one_stack = all(s.label.startswith("L") for s in sites)
    facts["attentions"] = [s.layer for s in sites] if one_stack else []
    return run.report(facts, first_prompt)


class _Run:
    """Passes over batches of prompts, and their sums."""

    def __init__(
        self,
        model: HookedModel,
        layers: tuple[LayerSites, ...],
        prompts: Prompts,
        formats: tuple[CacheFormat, ...] | None,
        sparse: float,
        drawing: tuple[int, int, int],
    ) -> None:
        self.model, self.layers, self.prompts = model, layers, prompts
        self.sparse, (self.seed, self.first_prompt, self.samples) = sparse, drawing
        self.asked = formats
        self.formats: tuple[CacheFormat, ...] = ()
        self.left_out: dict[str, str] = {}
        ends = np.cumsum([0, *(s.n_kv_heads for s in layers)])
        self.units = [slice(a, b) for a, b in pairwise(ends)]
        self.sums: dict[str, np.ndarray] = {}
        self.sizes: list[dict[CacheRole, int]] = [{} for _ in layers]
        self.gradients = Gradients(layers) if self.samples else None
        self._errors: dict[tuple[int, CacheRole], list[Tensor]] = {}
        self._indices: Sequence[int] = ()

    def _begin(self, view: LayerView) -> None:
        """Choose formats, once the width of a head is known; make room."""
        if self.sums:
            return
        prompts = [*enumerate(self.prompts.first), *enumerate(self.prompts.decoder)]
        first = self.first_prompt
        lengths = {len(ids): f"prompt {first + i}" for i, ids in reversed(prompts)}
        lengths = {view.vectors["k"].shape[1]: "", **lengths}  # images have no list of tokens
        some = map(read_format, DEFAULT_FORMATS) if self.asked is None else self.asked
        whys = {text_of(f): _refusal(f, view, lengths) for f in some}
        refused = {n: why for n, why in whys.items() if why}
        if self.asked is not None and refused:
            raise ValueError("; ".join(f"formats: {n}: {why}" for n, why in refused.items()))
        self.left_out = refused
        self.formats = tuple(read_format(n) for n in whys if n not in refused)
        n, f, u = len(self.prompts), len(self.formats), self.units[-1].stop
        self.sums = {
            **{f"{what}_{role}": np.zeros((f, u, n)) for what in _VECTORS for role in ROLES},
            "score": np.zeros((f, u, n)),
            "rows": np.zeros((u, n, 2), np.int64),
            "examined": np.zeros((u, n), np.int64),
            **{what: np.zeros((f, u, n, 2), np.int64) for what in ("able", "moved")},
            "vectors": np.zeros(n, np.int64),
            "positions": np.zeros(n, np.int64),
        }

    def batch(self, indices: Sequence[int], given: ModelInput) -> None:
        """One pass, and the backward passes of its samples."""
        self._indices, self._errors = indices, {}
        hooks = [] if self.gradients is None else self.gradients.hooks()
        with torch.set_grad_enabled(self.gradients is not None):
            logits = view_layers(
                self.model,
                given,
                self.layers,
                self._layer,
                indices,
                ("q", "k", "v"),
                hooks=hooks,
                whole=self.gradients is not None,
            )
        if self.gradients is not None:
            with torch.enable_grad():
                self._risk(logits, indices)
        self._errors = {}

    @torch.no_grad()
    def _layer(self, view: LayerView) -> None:
        view = _detached(view)
        self._begin(view)
        indices, units = list(self._indices), self.units[view.index]
        starts = [self.prompts.starts[i] for i in indices] if self.prompts.starts else []
        rows = ScoreRows(view, self.sparse, first_tokens_of(starts, view.scores.shape[-1]))
        self._put("rows", units, rows.count(rows.several))
        self._put("examined", units, rows.examined())
        n_keys = view.vectors["k"].shape[1]
        if view.index == 0:
            self.sums["vectors"][indices] = n_keys
        each = float(self.sums["vectors"][indices[0]]) / n_keys  # cross-attention has other keys
        for role in ROLES:
            clean = view.vectors[role]
            self.sizes[view.index][role] = clean.shape[-1]
            for at, form in enumerate(self.formats):
                back = stored(form, role, clean.transpose(1, 2)).transpose(1, 2)
                wide, x = back.float(), clean.float()
                error = wide - x
                of_norms = norm_error(x, wide).double().square().sum(1) * each
                self._put(f"norm_{role}", (at, units), of_norms.cpu().numpy())
                turned = direction_error(x, wide).double().sum(1) * each
                self._put(f"direction_{role}", (at, units), turned.cpu().numpy())
                if role == "k":
                    for what, found in rows.effects(error).items():
                        self._put(what, (at, units), found)
                if self.gradients is not None:
                    self._errors.setdefault((view.index, role), []).append(error)

    def _put(self, name: str, at: Any, found: np.ndarray) -> None:
        """Numbers ``[batch, kv_head, ...]`` into their prompts' places."""
        whole = at if isinstance(at, tuple) else (at,)
        for row, index in zip(found, self._indices, strict=True):
            self.sums[name][(*whole, index)] = row

    def _risk(self, logits: Any, indices: Sequence[int]) -> None:
        assert self.gradients is not None

        def seeds(log_p: Tensor, sample: int) -> Tensor:
            self.sums["positions"][list(indices)] = log_p.shape[1]
            return draw_seeds(log_p, [(self.seed, self.first_prompt + i, sample) for i in indices])

        for found in self.gradients.of(logits, seeds, self.samples):
            with torch.no_grad():
                for (index, role), gradient in found.items():
                    if not bool(torch.isfinite(gradient).all()):
                        raise UnsupportedModelError(
                            "gradients of keys and values",
                            wanted="finite numbers",
                            got="an infinite one or NaN",
                            layer=self.layers[index].layer,
                        )
                    for at, error in enumerate(self._errors[index, role]):
                        nats = risk_of(gradient, error).cpu().numpy() / self.samples
                        for row, prompt in zip(nats, indices, strict=True):
                            self.sums[f"risk_{role}"][at, self.units[index], prompt] += row

    def report(self, model: Mapping[str, Any], first_prompt: int) -> CacheRisk:
        """Everything, as data."""
        settings = CacheSettings(
            formats=tuple(map(text_of, self.formats)),
            samples=self.samples,
            sparse=self.sparse,
            layers=tuple(s.layer for s in self.layers),
            seed=self.seed,
        )
        facts = {
            **model,
            "d_key": [size["k"] for size in self.sizes],
            "d_value": [size["v"] for size in self.sizes],
            "left_out": self.left_out,
        }
        return CacheRisk(
            settings=settings,
            model=facts,
            first_prompt=first_prompt,
            tokens=self.prompts.strings,
            decoder_tokens=self.prompts.decoder_strings,
            **self.sums,
        )


_VECTORS: Final = ("norm", "direction", "risk")


def _detached(view: LayerView) -> LayerView:
    return replace(
        view,
        scores=view.scores.detach(),
        pattern=view.pattern.detach(),
        vectors={role: x.detach() for role, x in view.vectors.items()},
    )


def _refusal(form: CacheFormat, view: LayerView, lengths: Mapping[int, str]) -> str:
    """Why a format can't store this layer's keys or values of a prompt, or would change none.

    ``lengths``: those of all prompts, with the first prompt that has each.
    """
    window = form.window if isinstance(form, KIVI) else 0
    for length, prompt in lengths.items():
        who = f"{prompt}, of {length} tokens: " if prompt and len(lengths) > 1 else ""
        if length <= window:
            kept = f"its window of {window} tokens, which stay as they are"
            return f"{who}wanted a prompt longer than {kept}"
        for role in ROLES:
            _, _, heads, d_head = view.vectors[role].shape
            why = form.refusal(role, heads, length, d_head)
            if why:
                return f"{who}{why}"
    return ""
