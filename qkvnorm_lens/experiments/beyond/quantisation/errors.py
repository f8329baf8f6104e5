"""What a quantised key/value cache does to attention rows and to a model's output, measured.

Keys and values are quantised as they enter the dot product and the average (a cache holds them so,
behind the rotary embedding); queries stay as they are. Attention is measured in each layer on its
clean inputs, the output with the whole cache quantised at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks import SPARSE, UnsupportedModelError
from hooks.measures.cache import recomputed
from hooks.model import Prompts, evaluating, hooked, input_device, model_pass, without_cache
from hooks.sites import LayerSites, LayerView, ScoreParts, Site, expand_factors, observe, qk_part
from qkvnorm_lens.experiments.beyond.quantisation.schemes import Quantise, Scheme
from qkvnorm_lens.experiments.core import UNSCORED

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Role = Literal["k", "v"]
CONTENT, SINK = 0, 1
ROLES: Final[tuple[tuple[Role, ...], ...]] = (("k", "v"), ("k",), ("v",))
EFFECTS: Final = ("moved_norm", "moved_direction", "moved", "strict")
Largest = dict[tuple[int, Role], float]


def largest_magnitudes(
    model: TransformerBridge,
    layers: Sequence[LayerSites],
    prompts: Prompts,
    batch_size: int,
    widths: set[int] | None = None,
) -> Largest:
    """Largest |x| among a layer's keys and values, by index of the layer: a static scale's data.

    ``widths`` is given the channels of a key's and a value's head.
    """
    found: Largest = {}

    def look(view: LayerView) -> None:
        for role in ("k", "v"):
            at: tuple[int, Role] = (view.index, role)
            found[at] = max(found.get(at, 0.0), float(view.vectors[role].abs().max()))
            if widths is not None:
                widths.add(view.vectors[role].shape[-1])

    observe(model, layers, prompts, look, vectors=("k", "v"), batch_size=batch_size)
    return found


# -- vectors ----------------------------------------------------------------------------------


def relative_norm(
    clean: Float[Tensor, "*axes d"], back: Float[Tensor, "*axes d"]
) -> Float[Tensor, "*axes"]:
    """|x'| / |x|; 1 where x is zero."""
    before, after = (torch.linalg.vector_norm(x, dim=-1) for x in (clean, back))
    return torch.where(before > 0, after / before, 1.0)


def direction_error(
    clean: Float[Tensor, "*axes d"], back: Float[Tensor, "*axes d"]
) -> Float[Tensor, "*axes"]:
    """1 - cos of the angle between x and x', from |x/|x| - x'/|x'||^2 / 2, which does not cancel.

    0 where x is zero, 1 where only x' is.
    """
    before, after = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (clean, back))
    u, w = (x / n.where(n > 0, 1.0) for x, n in ((clean, before), (back, after)))
    error = (u - w).square().sum(-1) / 2
    error = torch.where(after[..., 0] > 0, error, 1.0)
    return torch.where(before[..., 0] > 0, error, 0.0)


@dataclass
class VectorErrors:
    """Sums over a layer's tokens, by key/value head."""

    n: int
    norm: np.ndarray
    norm_squared: np.ndarray
    norm_largest: np.ndarray
    direction: np.ndarray

    @classmethod
    def none(cls, heads: int) -> VectorErrors:
        """Before the first batch."""
        return cls(0, *(np.zeros(heads) for _ in range(4)))

    def add(self, clean: Tensor, back: Tensor) -> None:
        """One batch of vectors, ``[batch, pos, head, d_head]``."""
        error = (relative_norm(clean, back) - 1).double()
        turned = direction_error(clean, back).double()
        self.n += error.shape[0] * error.shape[1]
        self.norm += error.sum((0, 1)).cpu().numpy()
        self.norm_squared += error.square().sum((0, 1)).cpu().numpy()
        self.norm_largest = np.maximum(self.norm_largest, error.abs().amax((0, 1)).cpu().numpy())
        self.direction += turned.sum((0, 1)).cpu().numpy()

    def measures(self, role: Role, head: int) -> dict[str, float]:
        """Columns of a head: RMS, mean and largest relative norm error, mean of 1 - cos."""
        return {
            f"norm_{role}": float(np.sqrt(self.norm_squared[head] / self.n)),
            f"norm_mean_{role}": float(self.norm[head] / self.n),
            f"norm_largest_{role}": float(self.norm_largest[head]),
            f"direction_{role}": float(self.direction[head] / self.n),
        }


# -- rows -------------------------------------------------------------------------------------


class CacheErrors:
    """Errors of each scheme's keys and values, and the sparse rows whose arg max they move.

    Args:
        layers: those watched.
        schemes: cache formats.
        largest: of `largest_magnitudes`.
    """

    def __init__(
        self, layers: Sequence[LayerSites], schemes: Sequence[Scheme], largest: Largest
    ) -> None:
        self.schemes = schemes
        self.largest = largest
        self.rows = [np.zeros((s.n_heads, 2), dtype=np.int64) for s in layers]
        self.errors: dict[tuple[str, int, Role], VectorErrors] = {}
        self.moved: dict[tuple[str, int, str], np.ndarray] = {}
        for scheme, (i, s) in itertools.product(schemes, enumerate(layers)):
            for role in ROLES[0]:
                self.errors[scheme.name, i, role] = VectorErrors.none(s.n_kv_heads)
            for effect in EFFECTS:
                self.moved[scheme.name, i, effect] = np.zeros_like(self.rows[i])

    def add(self, view: LayerView) -> None:
        """One layer of one batch, for `observe`; asks for q, k and v."""
        wide = view.scores.dtype
        q, k, v = (view.vectors[role].to(wide) for role in ("q", "k", "v"))
        parts = recomputed(view, q, k)
        rows = _SparseRows(view, parts)
        self.rows[view.index] += rows.count(torch.ones_like(rows.sparse))
        for scheme in self.schemes:
            k_back = scheme.on_k(k, self.largest[view.index, "k"])
            v_back = scheme.on_v(v, self.largest[view.index, "v"])
            self.errors[scheme.name, view.index, "k"].add(k, k_back)
            self.errors[scheme.name, view.index, "v"].add(v, v_back)
            for effect, moved in rows.effects(q, k, k_back).items():
                self.moved[scheme.name, view.index, effect] += rows.count(moved)


class _SparseRows:
    """The sparse rows of one layer and batch, and what other keys do to them."""

    def __init__(self, view: LayerView, parts: ScoreParts) -> None:
        self.sites = view.sites
        self.parts = parts
        self.attended = parts.scores().argmax(-1)
        several = view.visible.sum(-1) >= 2
        self.sparse = several & (view.pattern.amax(-1) >= SPARSE)
        at = view.pattern.argmax(-1)
        wrong = int((self.sparse & (at != self.attended)).sum())
        if wrong:
            raise UnsupportedModelError(
                "scores from q and k",
                wanted="the model's own arg max in every sparse row",
                got=f"another in {wrong}",
                layer=view.sites.layer,
            )
        self.sink = self.attended == 0

    def count(self, rows: Tensor) -> np.ndarray:
        """Sparse rows among these, ``[head, kind]``."""
        chosen = rows & self.sparse
        both = torch.stack([(chosen & ~self.sink).sum((0, 2)), (chosen & self.sink).sum((0, 2))])
        counts: np.ndarray = both.T.cpu().numpy()
        return counts

    def effects(self, q: Tensor, k: Tensor, back: Tensor) -> dict[str, Tensor]:
        """Whose arg max moves under the norm error alone, the direction error alone, and both."""
        factor = relative_norm(k, back)
        turned = back / factor.where(factor > 0, 1.0)[..., None]  # the length of k
        moved = {
            "moved_norm": self._moved(self.parts.scores(expand_factors(self.sites, None, factor))),
            "moved_direction": self._moved(self._scores(q, turned)),
        }
        scores = self._scores(q, back)
        moved["moved"] = self._moved(scores)
        moved["strict"] = moved["moved"] & (self.parts.pattern_of(scores).amax(-1) >= SPARSE)
        return moved

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        s = qk_part(self.sites, q, k).masked_fill(~self.parts.mask, 0)
        return replace(self.parts, s=s).scores()

    def _moved(self, scores: Tensor) -> Tensor:
        return scores.argmax(-1) != self.attended


# -- output -----------------------------------------------------------------------------------


def output_effect(
    model: TransformerBridge,
    layers: Sequence[LayerSites],
    prompts: Prompts,
    targets: Sequence[Sequence[int]],
    schemes: Sequence[Scheme],
    largest: Largest,
    batch_size: int,
    *,
    apart: bool = True,
) -> list[dict[str, Any]]:
    """Loss, accuracy, KL(clean || quantised) and top-1 agreement, all layers' cache quantised.

    Over the scored positions; nats per token. ``apart``: keys alone and values alone too, which is
    what the column ``quantised`` says.
    """
    cells = [(s, roles) for roles in (ROLES if apart else ROLES[:1]) for s in schemes]
    sums = np.zeros((len(cells) + 1, 4))  # loss, correct, KL, agreement; the clean pass first
    n, options = 0, without_cache(model)
    with evaluating(model):
        for indices, given in prompts.batches(batch_size):
            wanted = torch.tensor([list(targets[i]) for i in indices])
            scored = wanted != UNSCORED
            if not bool(scored.any()):
                continue
            at, answers, n = scored.nonzero().T, wanted[scored], n + int(scored.sum())
            clean: Tensor | None = None
            for i, cell in enumerate((None, *cells)):
                hooks = [] if cell is None else cache_hooks(layers, *cell, largest)
                with hooked(model, hooks), model_pass():
                    logits = model(given.first.to(input_device(model)), **options)
                now = logits[at[0], at[1]].float().cpu().log_softmax(-1)
                clean = now if clean is None else clean
                sums[i] += _scores_of(now, clean, answers)
    before, *after = (sums / n).tolist()
    return [
        {
            "scheme": scheme.name,
            "quantised": "".join(roles),
            "positions": n,
            "loss_clean": before[0],
            "loss": loss,
            "accuracy_clean": before[1],
            "accuracy": accuracy,
            "kl": kl,
            "agreement": agreement,
        }
        for (scheme, roles), (loss, accuracy, kl, agreement) in zip(cells, after, strict=True)
    ]


def _scores_of(now: Tensor, clean: Tensor, answers: Tensor) -> np.ndarray:
    loss = -now.gather(1, answers[:, None]).double().sum()
    kl = (clean.exp() * (clean - now)).double().sum()
    best = now.argmax(-1)
    correct, agree = (best == answers).sum(), (best == clean.argmax(-1)).sum()
    return np.array([float(x) for x in (loss, correct, kl, agree)])


def cache_hooks(
    layers: Sequence[LayerSites], scheme: Scheme, roles: Sequence[Role], largest: Largest
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that put every layer's keys, values, or both through the cache."""
    entries = []
    for i, sites in enumerate(layers):
        for role in roles:
            site = sites.vector(role).dot
            quantise = scheme.on_k if role == "k" else scheme.on_v
            entries.append((site.hook, _through(site, quantise, largest[i, role])))
    return entries


def _through(site: Site, quantise: Quantise, largest: float) -> Callable[..., Tensor]:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:
        apart = site.by_position(tensor)
        wide = torch.promote_types(tensor.dtype, torch.float32)
        back = quantise(apart.to(wide), largest).to(tensor.dtype)
        if site.head_axis == 1:
            return back.transpose(1, 2)
        return back if site.head_axis == 2 else back.flatten(2)

    return hook_fn
