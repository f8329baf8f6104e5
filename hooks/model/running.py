"""The engine of every measurement: batches, one pass, its hooks, its end and its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooks.errors import UnsupportedModelError
from hooks.model.calls import BlockCall
from hooks.model.inputs import ModelInput
from hooks.model.progress import counting
from hooks.model.prompts import Prompts
from hooks.model.protocol import HookedModel
from hooks.model.state import Finished, evaluating
from hooks.model.tap import AttentionTap
from hooks.model.threads import Entries, hooked


def run_with(
    model: HookedModel,
    given: ModelInput | BlockCall,
    entries: Entries,
    tap: AttentionTap | None = None,
) -> Any:
    """What one forward pass, or a block's, returns with these hooks on; None if one ended it.

    A hook that raises `Finished` ends the pass: what follows isn't computed.
    """
    with contextlib.suppress(Finished), tap or contextlib.nullcontext(), hooked(model, entries):
        return given.run(model)
    return None


def over_batches(
    model: HookedModel,
    prompts: Prompts,
    batch_size: int,
    measure: Callable[[Sequence[int], ModelInput], None],
    *,
    what: str,
    progress: bool | None,
    padded: bool = False,
) -> None:
    """Call ``measure`` for each batch of prompts of one length, in eval mode, without gradients.

    It takes the prompts' indices and the model's input. ``progress`` shows a bar with the title
    ``what``; None: in a terminal or a notebook, and after a minute in a log. ``padded``: shorter
    prompts share a pass, padded at the end.
    """
    with evaluating(model), counting(len(prompts), what, "prompt", progress) as bar:
        for indices, given in prompts.batches(batch_size, padded=padded):
            measure(indices, given)
            bar.update(len(indices))


def checked_logits(logits: Any, *, classifier: bool = True) -> Float[Tensor, "batch pos d_vocab"]:
    """A pass's output as logits; a classifier's have one position, where they are accepted."""
    if not isinstance(logits, Tensor) or logits.ndim not in ((2, 3) if classifier else (3,)):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModelError(
            "logits to compare", wanted="a tensor [batch, pos, d_vocab]", got=f"{shape}"
        )
    return logits[:, None] if logits.ndim == 2 else logits
