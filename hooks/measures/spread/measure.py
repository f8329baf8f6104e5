"""Spread: how far the lengths of attended embeddings lie apart, head by head.

Under Pre-Norm a token's length multiplies every score of every subspace, so subspaces are
independent only while lengths hardly vary. The spread says how far they vary.
Source: Menary et al. 2024, Fig. 1 and 9-12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.arguments import check_booleans, check_choice, check_integers, check_optional
from hooks.errors import UnsupportedModelError
from hooks.measures.spread.report import Of, SpreadReport, SpreadSettings
from hooks.model import HookedModel, MaskLike, Prompts, Role, Tokens, encode, measurement
from hooks.sites import LayerSites, LayerView, attention_facts, choose_layers, observe, sites_for


@measurement
def spread(
    model: HookedModel,
    tokens: Tokens,
    *,
    of: Of = "stream",
    without_first: bool = True,
    layers: Sequence[int] | None = None,
    decoder_tokens: Tokens | None = None,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
    name: str | None = None,
) -> SpreadReport:
    """L2 norms per layer and head, weighted by attention, over the head's weighted median.

        r_t = |x_t| / median_A(|x|),    A_t = sum over prompts and queries of a_qt

    The median is that of the distribution in which token t has the weight A_t, and the band the
    smallest b with 90% of the weight in |r_t - 1| <= b. One forward pass; a layer is reduced to a
    norm and a weight per token (4 bytes each, for every layer, head and token) while it exists.
    Source: Menary et al. 2024, Fig. 1 and 9-12.

    Args:
        model, tokens, decoder_tokens, layers, attention_mask, prepend_bos, name: as in
            :func:`hooks.collapse_probe`.
        batch_size, progress: likewise.
        of: ``"stream"``, the embeddings at the input of the layer's block; ``"k"`` or ``"v"``, the
            vectors that enter the dot product (v: that are averaged); ``"q"``, the queries, each
            with the weight 1: they receive no attention.
        without_first: leave the first token (``[`` in addition, the attention sink of language
            models) out of median and band; its share and norm are always shown separately.

    Returns:
        :class:`SpreadReport`.

    Raises:
        UnsupportedModelError: the model failed the self-check, has no hook for what was requested,
            or gave a norm or a weight that is not finite; or ``of="stream"`` for a cross-attention,
            whose keys come from another stream than its block's.
        TypeError: ``without_first`` is neither True nor False.
        ValueError: an unknown ``of`` or layer, empty text, a sequence longer than the context.
    """
    of = cast(Of, check_choice("of", of, get_args(Of)))
    (batch_size,) = check_integers(batch_size=(batch_size, 1))
    (without_first,) = check_booleans(without_first=without_first)
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
        if of == "stream" and layer.sequence("q") != layer.sequence("k"):
            raise UnsupportedModelError(
                'spread(of="stream")',
                wanted="attention to the tokens of the block's own stream",
                got=f"cross-attention {layer.label} (leave it out with layers=, or take of='k')",
                layer=layer.layer,
            )
    gathered = _Gathered(chosen, of)
    roles: tuple[Role, ...] = () if of == "stream" else (of,)
    observe(
        model,
        chosen,
        prompts,
        gathered.add,
        vectors=roles,
        stream=of == "stream",
        batch_size=batch_size,
        progress=progress,
        what="spread",
    )
    settings = SpreadSettings(
        of=of, without_first=without_first, layers=tuple(s.layer for s in chosen)
    )
    return gathered.report(settings, attention_facts(model, sites, chosen, prompts, name), prompts)


class _Gathered:
    """Norms and weights of each layer, prompt by prompt."""

    def __init__(self, layers: Sequence[LayerSites], of: Of) -> None:
        self.of = of
        self._pieces: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [{} for _ in layers]

    def add(self, view: LayerView) -> None:
        """One layer of one batch."""
        norms = _norms(view, self.of)  # [batch, vector, token]
        weights = torch.ones_like(norms) if self.of == "q" else view.pattern.sum(2)
        for name, found in (("norm", norms), ("attention weight", weights)):
            if not bool(torch.isfinite(found).all()):
                raise UnsupportedModelError(
                    f"spread of {self.of}",
                    wanted=f"finite numbers as {name}s",
                    got="an infinite one or NaN",
                    layer=view.sites.layer,
                )
        norms, weights = (x.float().cpu() for x in (norms, weights))
        for row, prompt in enumerate(view.prompts):
            self._pieces[view.index][prompt] = (norms[row].numpy(), weights[row].numpy())

    def report(
        self, settings: SpreadSettings, model: Mapping[str, Any], prompts: Prompts
    ) -> SpreadReport:
        """All prompts concatenated, in their order."""
        order = range(len(prompts))
        norms, weights, prompt, position = [], [], [], []
        for pieces in self._pieces:
            norms.append(np.concatenate([pieces[i][0] for i in order], axis=1))
            weights.append(np.concatenate([pieces[i][1] for i in order], axis=1))
            lengths = [pieces[i][0].shape[1] for i in order]
            prompt.append(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
            position.append(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]))
        return SpreadReport(
            settings=settings,
            model=model,
            tokens=prompts.strings,
            decoder_tokens=prompts.decoder_strings,
            starts=prompts.starts if prompts.packed else (),
            norms=tuple(norms),
            weights=tuple(weights),
            prompt=tuple(prompt),
            position=tuple(position),
        )


def _norms(view: LayerView, of: Of) -> Float[Tensor, "batch vector token"]:
    """L2 norms in float32 or wider: squares overflow half precision."""
    if of == "stream":
        assert view.stream is not None
        vectors = view.stream[:, :, None]
    else:
        vectors = view.vectors[of]
    wide = torch.promote_types(vectors.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=wide)
    return norms.transpose(1, 2)
