"""A long text, decoded with several caches at once: what accumulates, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pandas as pd
import torch
from torch import Tensor

from qkvnorm_lens.experiments.beyond.caches.passes import ROLES
from qkvnorm_lens.experiments.core import Subject, about

CACHES: Final = ("full", "transformers-fp8", "q4_0", "quanto-int4", "hqq-int4", "kivi-int4")
PROMPT: Final = 64
SPAN: Final = 100
"""Steps of a row of the table."""


def decoding(subject: Subject, steps: int) -> pd.DataFrame:
    """Rows for each span of steps and format, over one text that the full cache's row draws.

    Columns: format, step (the last one of the span), kl and agreement of the span's steps with the
    full cache; and of the cache at its end, against the full cache's own: RMS and mean relative
    error of the keys' norms and mean 1 - cos, of the prompt's tokens (``..._prompt``) and of the
    span's (``..._new``), over layers and heads. Quantised keys go back into the model: errors of
    later tokens hold what earlier ones did.
    """
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import Cache

    from qkvnorm_lens import text

    ids = text.windows(subject.load(), text.passage(), length=PROMPT, limit=1).ids[0]
    model: Any = AutoModelForCausalLM.from_pretrained(subject.source, dtype=torch.float32).eval()
    layers = [_rows() for _ in range(model.config.num_hidden_layers)]
    cache, n = Cache(layers=layers), len(CACHES)
    draws = torch.Generator().manual_seed(0)
    given, out, sums = torch.tensor([ids] * n), [], torch.zeros(2, n, dtype=torch.float64)
    for step in range(1, steps + 1):
        with torch.no_grad():
            logits = model(given, past_key_values=cache).logits[:, -1]
        log_p = logits.double().log_softmax(-1)
        sums[0] += (log_p[0].exp() * (log_p[0] - log_p)).sum(-1)
        sums[1] += log_p.argmax(-1) == log_p[0].argmax()
        drawn = torch.multinomial(log_p[0].exp(), 1, generator=draws)
        given = drawn.expand(n, 1)
        if step % SPAN == 0 or step == steps:
            span = (step - 1) % SPAN + 1
            out += _rows_of(layers, step, span, sums / span)
            sums.zero_()
    return about(subject, pd.DataFrame(out).assign(what="step"), "what")


def _rows() -> Any:
    from transformers.cache_utils import DynamicLayer

    from hooks.measures.cache import read_format

    class Rows(DynamicLayer):
        """Each row of the batch in a cache of its own format."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            forms = [read_format(name) for name in CACHES]
            self.stores = {role: [form.store(role) for form in forms] for role in ("k", "v")}
            self.length = 0

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.length += key_states.shape[-2]
            both = zip(ROLES, (key_states, value_states), strict=True)
            return tuple(
                torch.cat(
                    [s.append(row) for s, row in zip(self.stores[r], x.split(1), strict=True)]
                )
                for r, x in both
            )

        def get_seq_length(self) -> int:
            return self.length

    return Rows()


def _rows_of(layers: Sequence[Any], step: int, span: int, means: Tensor) -> list[dict[str, Any]]:
    out = []
    for at, name in enumerate(CACHES[1:], 1):
        found: dict[str, list[Tensor]] = {}
        for layer in layers:
            clean, back = (layer.stores["k"][i].read()[0] for i in (0, at))
            grown = back.norm(dim=-1) / clean.norm(dim=-1) - 1
            turned = 1 - torch.cosine_similarity(back, clean, dim=-1)
            for kind, some in (("prompt", slice(0, PROMPT)), ("new", slice(-span, None))):
                found.setdefault(f"norm_{kind}", []).append(grown[:, some].square().mean())
                found.setdefault(f"norm_mean_{kind}", []).append(grown[:, some].mean())
                found.setdefault(f"direction_{kind}", []).append(turned[:, some].mean())
        mean = {key: float(torch.stack(x).mean()) for key, x in found.items()}
        mean |= {key: x**0.5 for key, x in mean.items() if key in ("norm_prompt", "norm_new")}
        own = {"kl": float(means[0, at]), "agreement": float(means[1, at])}
        out.append({"format": name, "step": step, **own, **mean})
    return out
