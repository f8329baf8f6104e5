"""Passes with a cache in one layer or in all, and what other measures read from a clean pass."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hooks.measures.cache import Gradients, choose, read_format, stored
from hooks.model import Prompts, evaluating, hooked, model_pass
from hooks.sites import LayerSites, LayerView, as_hooked, observe

ROLES: tuple[Any, ...] = ("k", "v")


class Watched:
    """A model on calibration prompts of one length or several.

    Attributes:
        formats: those that can store its heads.
        seconds: what whole passes for each layer and format take, keys and values in one.
    """

    def __init__(
        self, model: Any, layers: Sequence[LayerSites], prompts: Prompts, formats: Sequence[str]
    ) -> None:
        self.model, self.layers, self.prompts = model, layers, prompts
        self.seconds = 0.0
        self._vectors: dict[tuple[int, Any], list[Tensor]] = {}
        self._entropy = np.zeros(len(layers))
        observe(model, layers, prompts, self._look, vectors=ROLES, batch_size=64)
        widths = [x.shape for xs in self._vectors.values() for x in xs]
        self.formats = tuple(
            name
            for name in formats
            if not any(
                read_format(name).refusal(r, h, n, d) for _, h, n, d in widths for r in ROLES
            )
        )
        self._width = widths[0][-1]

    @torch.no_grad()
    def _look(self, view: LayerView) -> None:
        for role in ROLES:
            found = view.vectors[role].transpose(1, 2)
            self._vectors.setdefault((view.index, role), []).append(found)
        p = view.pattern
        rows = -(p * p.clamp_min(1e-30).log()).sum(-1)
        self._entropy[view.index] += float(rows.sum()) / rows[:, 0].numel() / rows.shape[1]

    def bits(self, name: str) -> float:
        """Per stored number."""
        return read_format(name).bits("k", self._width)

    # -- what other measures read ------------------------------------------------------------

    def entropy(self) -> np.ndarray:
        """Mean entropy of a layer's attention rows."""
        return self._entropy

    def errors(self) -> dict[tuple[str, int, str], tuple[float, float]]:
        """Mean square error, and sum of squared errors over that of squares."""
        out = {}
        for name, ((i, role), parts) in itertools.product(self.formats, self._vectors.items()):
            error = size = count = 0.0
            for x in parts:
                back = stored(read_format(name), role, x)
                error += float((back - x).double().square().sum())
                size, count = size + float(x.double().square().sum()), count + x.numel()
            out[name, i, role] = (error / count, error / size)
        return out

    def gradients(self) -> dict[tuple[int, str], float]:
        """L2 norm of the gradient of the model's loss on drawn tokens."""
        out: dict[tuple[int, str], float] = {}
        for indices, given in self.prompts.batches(8):
            leaves = Gradients(self.layers)
            with evaluating(self.model), torch.enable_grad(), hooked(self.model, leaves.hooks()):
                logits = given.run(self.model)
                draws = torch.Generator().manual_seed(indices[0])
                for found in leaves.of(logits, partial(_of_tokens, draws), 1):
                    for at, g in found.items():
                        out[at] = out.get(at, 0.0) + float(g.square().sum())
        return {at: square**0.5 for at, square in out.items()}

    # -- passes with a cache -----------------------------------------------------------------

    @property
    def positions(self) -> np.ndarray:
        """Tokens of each prompt."""
        return np.array([len(row) for row in self.prompts.first])

    def isolated(self) -> dict[tuple[str, int, str], np.ndarray]:
        """KL(clean || cached), nats a prompt, with one layer's keys, or values, in a format.

        A pass begins at the layer, from the clean pass's stream, where that gives the same to the
        bit; :attr:`seconds` is then the time of one whole pass times their number.
        """
        started = time.perf_counter()
        clean = self._log_p(self.prompts, [])
        self.seconds = time.perf_counter() - started
        self.seconds *= len(self.formats) * len(self.layers)
        streams = self._streams(clean)
        out = {}
        for name, (i, sites), role in itertools.product(
            self.formats, enumerate(self.layers), ROLES
        ):
            begin = None if streams is None else (sites.layer, streams[i])
            now = self._log_p(self.prompts, [_through(sites, role, name)], begin)
            out[name, i, role] = _kl(clean, now)[0]
        return out

    def with_cache(self, sites: LayerSites, name: str) -> list[Tensor]:
        """Log-probabilities of each prompt's next tokens, this layer's cache in a format."""
        return self._log_p(self.prompts, [_through(sites, role, name) for role in ROLES])

    def _streams(self, clean: Sequence[Tensor]) -> list[dict[int, Tensor]] | None:
        """The stream at each layer, batch by batch; None where passes can't begin there."""
        kept: list[dict[int, Tensor]] = [{} for _ in self.layers]

        def keep(view: LayerView) -> None:
            assert view.stream is not None
            kept[view.index][view.prompts[0]] = view.stream.clone()

        try:
            observe(self.model, self.layers, self.prompts, keep, stream=True, batch_size=64)
            middle = len(self.layers) // 2
            begin = (self.layers[middle].layer, kept[middle])
            again = self._log_p(self.prompts, [], begin)
        except (TypeError, ValueError, RuntimeError):
            return None
        same = all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
        return kept if same else None

    def _log_p(
        self,
        prompts: Prompts,
        hooks: Sequence[Any],
        begin: tuple[int, Mapping[int, Tensor]] | None = None,
    ) -> list[Tensor]:
        """Log-probabilities of each prompt's next tokens; ``begin``: a layer, and its stream."""
        out: dict[int, Tensor] = {}
        for indices, given in prompts.batches(64):
            with evaluating(self.model), hooked(self.model, list(hooks)), model_pass():
                if begin is None:
                    logits = given.run(self.model).float().log_softmax(-1)
                else:
                    layer, stream = begin
                    at = self.model(stream[indices[0]], start_at_layer=layer)
                    logits = at.float().log_softmax(-1)
            out |= dict(zip(indices, logits, strict=True))
        return [out[i] for i in range(len(prompts))]

    def choose(
        self, losses: pd.DataFrame, menu: Sequence[str], budget: float
    ) -> list[tuple[str, str]] | None:
        """Formats of least ``loss`` under the budget, layer by layer."""
        columns = (losses[name].tolist() for name in ("layer", "role", "format", "loss"))
        table = {tuple(at): loss for *at, loss in zip(*columns, strict=True)}
        items = [
            {n: (Fraction(self.bits(n)), table[sites.layer, role, n]) for n in menu}
            for sites in self.layers
            for role in ROLES
        ]
        found = choose(items, Fraction(budget) * len(items))
        return None if found is None else list(zip(found[::2], found[1::2], strict=True))

    def judge(
        self, held: Prompts, choices: Mapping[tuple[str, float], Sequence[tuple[str, str]]]
    ) -> pd.DataFrame:
        """KL and agreement of the best token on each held-out prompt, all layers in a recipe."""
        clean, rows = self._log_p(held, []), []
        for (name, budget), pairs in choices.items():
            hooks = [
                _through(sites, role, form)
                for sites, pair in zip(self.layers, pairs, strict=True)
                for role, form in zip(ROLES, pair, strict=True)
            ]
            kl, agree = _kl(clean, self._log_p(held, hooks))
            bits = float(np.mean([self.bits(form) for pair in pairs for form in pair]))
            for prompt, own in enumerate(clean):
                rows.append(
                    {
                        "choice": name,
                        "budget": budget,
                        "bits": bits,
                        "prompt": prompt,
                        "positions": len(own),
                        "kl": float(kl[prompt]) / len(own),
                        "agreement": float(agree[prompt]) / len(own),
                    }
                )
        return pd.DataFrame(rows)


def _of_tokens(draws: torch.Generator, log_p: Tensor, sample: int) -> Tensor:
    """The gradient, by logits, of the log-probability of a token drawn at each position."""
    p = log_p.exp()
    drawn = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=draws).view(*p.shape[:2], 1)
    return (-p).scatter_add(-1, drawn.to(p.device), torch.ones_like(p))


def _through(sites: LayerSites, role: Any, name: str) -> tuple[str, Any]:
    """A hook that puts one layer's keys or values through a cache."""
    site, form = sites.vector(role).dot, read_format(name)

    def put(x: Tensor, hook: Any) -> Tensor:
        back = stored(form, role, site.by_position(x).transpose(1, 2)).transpose(1, 2)
        return as_hooked(site, back)

    return site.hook, put


def _kl(clean: Sequence[Tensor], now: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Sums over each prompt's positions: nats, and the same best token."""
    kl = [float((p.exp() * (p - q)).double().sum()) for p, q in zip(clean, now, strict=True)]
    same = [int((p.argmax(-1) == q.argmax(-1)).sum()) for p, q in zip(clean, now, strict=True)]
    return np.array(kl), np.array(same)
