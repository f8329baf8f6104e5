"""What a sweep scores: given targets, or the next token where the model predicts one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooks.measures.sweep.score import UNSCORED
from hooks.model import HookedModel, ModelInput, Prompts, shorten, tensor_of


def _rows_of(targets: Any) -> list[Tensor]:
    """A row for each prompt; one prompt's own may stand alone."""
    try:
        given = [tensor_of(row) for row in targets]
        return [torch.stack(given)] if given and given[0].ndim == 0 else given
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"targets: wanted integer ids [batch, pos]; got {shorten(targets)}"
        ) from None


def next_tokens(prompts: Prompts) -> list[Tensor | None]:
    """Targets of each prompt: its next tokens.

    A packed document's last token has none: what follows it is another document's.
    """
    rows = prompts.decoder or prompts.first
    out: list[Tensor | None] = []
    for index, row in enumerate(rows):
        wanted = torch.cat([row[1:].cpu(), torch.tensor([UNSCORED])])
        if not prompts.decoder and prompts.starts:
            wanted[[start - 1 for start in prompts.starts[index] if start]] = UNSCORED
        out.append(wanted)
    return out


def given_targets(model: HookedModel, targets: Any, prompts: Prompts) -> list[Tensor | None]:
    """Targets of each prompt, cut where the tokens were that they are of.

    Raises:
        ValueError: other shapes than the tokens', or an id outside the vocabulary.
    """
    spans, width = prompts.spans, prompts.width
    if prompts.decoder:
        spans, width = prompts.decoder_spans, prompts.decoder_width
    given = _rows_of(targets)
    if len(given) != len(prompts):
        raise ValueError(
            f"targets: wanted one row for each of {len(prompts)} prompts; got {len(given)}"
        )
    rows = prompts.decoder or prompts.first
    cut = []
    for index, (row, ids, (first, end)) in enumerate(zip(given, rows, spans, strict=True)):
        of_tokens = len(ids) if ids.ndim == 1 else len(row)
        ragged = not prompts.decoder and not prompts.padding[index]  # the caller padded nothing
        fits = row.ndim == 1 and len(row) in (width or of_tokens, of_tokens if ragged else -1)
        if row.is_floating_point() or row.dtype == torch.bool or not fits:
            raise ValueError(
                f"targets: prompt {index}: wanted {width or of_tokens} integer ids, one for each "
                f"token, padding included; got {row.dtype} of shape {list(row.shape)}"
            )
        mine = (row[first:end] if len(row) == width else row).cpu().long()
        real = mine[mine != UNSCORED]
        vocabulary = int(model.cfg.d_vocab)
        if len(real) and not 0 <= int(real.min()) <= int(real.max()) < vocabulary:
            raise ValueError(
                f"targets: prompt {index}: wanted ids from 0 to {vocabulary - 1}, or {UNSCORED} "
                f"where nothing is scored; got {int(real.min())} to {int(real.max())}"
            )
        cut.append(mine)
    return list(cut)


def scored_places(
    row: Tensor | None, index: int, n_pos: int
) -> tuple[Int[Tensor, "place"], Int[Tensor, "place"]]:
    """Positions of a prompt that are scored, and their targets; all, `UNSCORED`, without any."""
    if row is None:
        return torch.arange(n_pos), torch.full((n_pos,), UNSCORED)
    if len(row) != n_pos:
        raise ValueError(
            f"targets: prompt {index}: wanted {n_pos}, one for each position of the logits; got "
            f"{len(row)}"
        )
    where = (row != UNSCORED).nonzero().flatten()
    return where, row[where]


def has_next_token(model: HookedModel, example: ModelInput) -> bool:
    """Whether logits depend on no later token, so that the next token is a position's target."""
    ids = example.first
    if ids.is_floating_point() or ids.ndim != 2 or ids.shape[1] < 2:
        return False
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % int(model.cfg.d_vocab)
    both = [replace(example, first=x).run(model) for x in (ids, other)]
    if not all(isinstance(z, Tensor) and z.ndim == 3 for z in both):
        return False
    a, b = (z[:, :-1].double() for z in both)
    if not a.shape[1]:
        return False
    # Equal to the last bit in most models; experts that are sent other rows round otherwise.
    within = max(4 * torch.finfo(both[0].dtype).eps, 1e-5) * float(a.abs().max())
    return float((a - b).abs().max()) <= within


def scored_targets(
    model: HookedModel, prompts: Prompts, targets: Any, example: ModelInput
) -> list[Int[Tensor, "_"] | None]:
    """Each prompt's targets: those given, or its next tokens; None where it has none."""
    if targets is not None:
        return given_targets(model, targets, prompts)
    known = bool(prompts.decoder) or has_next_token(model, example)
    return next_tokens(prompts) if known else [None] * len(prompts)
