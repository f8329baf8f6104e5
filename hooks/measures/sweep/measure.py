"""The sweep: what a model's output loses when norm noise is on in all layers at once.

Protocol of Menary et al. 2024, Fig. 2: independent noise on the norms of q, k and v in every layer
of one pass; accuracy against its RMS sigma. Clean and noisy rows share their batches, and all
sigmas their draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooks.arguments import MANY, brief, check_integers, check_layers, check_optional
from hooks.measures.sweep.factors import Grid
from hooks.measures.sweep.passes import Pass, Runner, passes
from hooks.measures.sweep.report import SweepReport, SweepSettings
from hooks.measures.sweep.score import UNSCORED, score
from hooks.measures.sweep.targets import scored_places, scored_targets
from hooks.model import (
    HookedModel,
    MaskLike,
    Prompts,
    Tokens,
    counting,
    encode,
    evaluating,
    example_of,
    hooked,
    measurement,
)
from hooks.noise import At, NormNoise, Rows, Shared, read_sigmas
from hooks.sites import attention_facts, choose_layers, sites_for

SWEEP_SIGMAS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)


@measurement
def sweep(
    model: HookedModel,
    tokens: Tokens,
    *,
    decoder_tokens: Tokens | None = None,
    targets: Int[Tensor, "*prompts target"] | Sequence[Any] | None = None,
    sigmas: Sequence[float] | None = None,
    replicates: int = 8,
    on: str = "qkv",
    law: str = "uniform",
    shared: Shared = "none",
    at: At = "dot",
    rows: Rows = "all",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    attention_mask: MaskLike | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    first_prompt: int = 0,
    progress: bool | None = None,
    name: str | None = None,
) -> SweepReport:
    """Accuracy, loss, KL(clean || noisy) and top-1 agreement under norm noise, against sigma.

    x -> (1 + kappa) x for each q, k and v in all chosen layers of one pass, kappa of RMS sigma.
    Draw d at sigma is ``NormNoise(sigma=sigma, draw=d, seed=seed, ...)``, the same uniform numbers
    at every sigma. Source: Menary et al. 2024, Fig. 2.

    Args:
        model: as in :func:`hooks.collapse_probe`. Hooks of your own stay on, and see clean and
            noisy rows in one batch.
        tokens, decoder_tokens, layers, attention_mask, prepend_bos, progress, name: as
            there.
        targets: what should follow ``tokens[b, : p + 1]`` (in an encoder-decoder: the decoder's
            tokens), -100 where nothing is scored; padded like the tokens. Default: the next token.
            A model that predicts no next token (BERT) has KL and agreement at all positions, and no
            accuracy.
        sigmas: RMS of the relative change of a norm; default: 8 from 1% to 30%, as far as the law
            goes. Sigma = 0 is always measured: it is the clean row.
        replicates: draws per sigma.
        on, law, shared, at, rows: as in :class:`NormNoise`.
        seed: of the noise.
        batch_size: rows per forward pass; a prompt has 1 + sigmas x replicates of them.
        first_prompt: index of the first prompt: parts of a corpus, each swept with the index at
            which it starts, draw the noise of the whole and :meth:`SweepReport.merge` exactly.

    Returns:
        :class:`SweepReport`.

    Raises:
        UnsupportedModelError: the model failed the self-check, or gives no logits.
        ValueError: no scored position, a target outside the vocabulary, a sigma that the law can't
            have, an unknown layer, site, law or option; and as :func:`hooks.collapse_probe`.
    """
    values = _sigmas(sigmas, law)
    replicates, batch_size, first_prompt = check_integers(
        replicates=(replicates, 1, MANY), batch_size=(batch_size, 1), first_prompt=(first_prompt, 0)
    )
    _, progress = check_optional(prepend_bos=prepend_bos, progress=progress)
    asked = None if layers is None else tuple(sorted(check_layers(layers)))
    noise = NormNoise(
        sigma=values[-1], on=on, law=law, shared=shared, at=at, rows=rows, layers=asked, seed=seed
    )
    prompts = encode(
        model,
        tokens,
        decoder_tokens=decoder_tokens,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    sites = sites_for(model, prompts)
    chosen = choose_layers(sites, asked)
    grid = Grid(values, replicates)
    with evaluating(model):
        example = example_of(model, prompts)
        tally = _Tally(prompts, scored_targets(model, prompts, targets, example), grid)
        runner = Runner(model, noise, sites, chosen, grid)
        with (
            hooked(model, runner.hooks()),
            runner.tap if runner.tap.needed else contextlib.nullcontext(),
            counting(len(prompts) * len(grid), "sweep", "row", progress) as bar,
        ):
            runner.try_on(example)
            # One row for the clean blocks pays where a prompt fills a pass by itself.
            alone = bool(runner.block) and 2 * len(grid) >= batch_size
            for part in passes(prompts, grid, batch_size, alone=alone):
                tally.run(runner, part, first_prompt, alone)
                bar.update(len(part.prompts) * len(part.conditions))
    settings = _settings(noise, grid, tuple(s.layer for s in chosen))
    return tally.report(
        settings, attention_facts(model, sites, chosen, prompts, name), first_prompt
    )


def _settings(noise: NormNoise, grid: Grid, layers: tuple[int, ...]) -> SweepSettings:
    same = {name: getattr(noise, name) for name in ("law", "shared", "at", "rows", "seed")}
    on = "".join(noise.roles)
    return SweepSettings(
        sigmas=grid.sigmas, replicates=grid.replicates, on=on, layers=layers, **same
    )


def _sigmas(sigmas: Sequence[float] | None, law: str) -> tuple[float, ...]:
    values = sorted(read_sigmas(sigmas, law, SWEEP_SIGMAS))
    if len(set(values)) < len(values):
        raise ValueError(f"sigmas: wanted each once; got {brief(values)}")
    noisy = tuple(s for s in values if s > 0)  # 0 is the clean row, which is always there
    if not noisy:
        raise ValueError(f"sigmas: wanted one or more above 0; got {values}")
    return noisy


# -- what is scored -------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums over the scored positions of each prompt, pass by pass."""

    prompts: Prompts
    targets: list[Tensor | None]
    grid: Grid

    def __post_init__(self) -> None:
        n = len(self.prompts)
        if not any(map(self._scored, range(n))):
            raise ValueError(
                "targets: wanted at least one scored position; got none (a prompt of one token has "
                "no next token)"
            )
        self.sums = np.zeros((4, n, len(self.grid)))  # correct, agree, loss, KL
        self.positions = np.zeros(n, dtype=np.int64)
        self._clean: Tensor | None = None

    def run(self, runner: Runner, part: Pass, first_prompt: int, alone: bool) -> None:
        """Run one pass and add its sums."""
        some = [i for i in part.prompts if self._scored(i)]
        if not some:
            return
        numbers = [first_prompt + i for i in some]
        given = self.prompts.batch(some)
        with runner.spreading(alone):
            states = runner.run(given, numbers, part.conditions)
        prompt, pos, targets = self._places(some, states.shape[1])
        begins, ends = part.conditions.start == 0, part.conditions.stop == len(self.grid)
        scored, kept = score(
            states,
            (prompt, pos),
            targets,
            len(part.conditions),
            runner.head,
            None if begins else self._clean,
            keep=not ends,
        )
        self._clean = None if ends else kept
        values, of = scored.stacked().numpy(), prompt.numpy()
        at = slice(part.conditions.start, part.conditions.stop)
        for local, index in enumerate(some):
            self.sums[:, index, at] = values[:, of == local].sum(1)
            self.positions[index] = int((of == local).sum())

    def _scored(self, index: int) -> bool:
        row = self.targets[index]
        return row is None or bool((row != UNSCORED).any())

    def _places(self, some: Sequence[int], n_pos: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt (counted in the pass), position and target of every scored position."""
        prompt, pos, targets = [], [], []
        for local, index in enumerate(some):
            where, wanted = scored_places(self.targets[index], index, n_pos)
            prompt.append(torch.full_like(where, local))
            pos.append(where)
            targets.append(wanted)
        return torch.cat(prompt), torch.cat(pos), torch.cat(targets)

    def report(
        self, settings: SweepSettings, model: dict[str, Any], first_prompt: int
    ) -> SweepReport:
        """All sums, as [sigma, draw, prompt]."""
        n = len(self.prompts)
        known = self.targets[0] is not None
        correct, agree, loss, kl = self.sums
        if not known:
            loss = np.zeros_like(loss)

        def noisy(values: np.ndarray, kind: type) -> np.ndarray:
            shape = (n, self.grid.replicates, len(self.grid.sigmas))
            return np.ascontiguousarray(values[:, 1:].reshape(shape).T.astype(kind))

        return SweepReport(
            settings=settings,
            model=model,
            first_prompt=first_prompt,
            tokens=self.prompts.strings,
            decoder_tokens=self.prompts.decoder_strings,
            positions=self.positions,
            targets=self.positions if known else np.zeros_like(self.positions),
            clean_correct=correct[:, 0].astype(np.int64),
            clean_loss=loss[:, 0].copy(),
            correct=noisy(correct, np.int64),
            agree=noisy(agree, np.int64),
            loss=noisy(loss, np.float64),
            kl=noisy(kl, np.float64),
        )
