"""The model's own numbers for a case: the oracle's passes, with the user's hooks and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hooks
from tests.fuzz import zoo
from tests.fuzz.around import cached_v, torch_as_it_is, torch_hook, with_column, with_head
from tests.fuzz.cases import LONG, Case, Given
from tests.oracles import forward as oracle
from tests.support.families import N_HEADS


@dataclass(frozen=True)
class Slack:
    """How far numbers in the model's dtype may lie from the float64 ones."""

    scores: tuple[float, ...]
    logits: float


class Truth:
    """The oracle's passes for a case."""

    def __init__(self, case: Case, model: zoo.Model, what: Given) -> None:
        self.case, self.model, self.what = case, model, what
        self.kind = model.family
        with torch_as_it_is():
            self.clean = self.run()
            self.slack = self._slack()

    def run(self, edits: oracle.Edits | None = None, hf: Any = None) -> oracle.Pass:
        """The user's own pass, with the user's own hooks."""
        hf = self.model.hf if hf is None else hf
        both = _both(edits or {}, self._of_user())
        with torch_hook(self.case, hf):
            return oracle.run(hf, self.inputs(), n_heads=N_HEADS, edits=both)

    def inputs(self) -> dict[str, Any]:
        """As Hugging Face's model takes them; positions as TransformerLens counts them."""
        inputs = dict(self.what.inputs)
        mask = inputs.get("attention_mask")
        if (
            self.kind.counts
            and mask is not None
            and mask.ndim == 2
            and "position_ids" not in inputs
        ):
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        return inputs

    def _of_user(self) -> oracle.Edits:
        hook, named = self.case.hook, {}
        if hook == "scale q":
            named = {"q": lambda q: q * 1.5}
        elif hook == "ablate z":
            named = {"z": lambda z: with_head(z, 0.0)}
        elif hook == "zero pattern":
            named = {"pattern": lambda p: with_head(p, 0.0)}
        elif hook == "patch v":
            named = {"v": lambda v: self.patch(v)}
        elif hook == "long":
            named = {"z": lambda z: with_head(z, 0.0) if z.shape[2] > LONG else z}
        elif hook == "column":
            named = {"z": with_column}
        return {0: named} if named else {}

    def patch(self, v: Tensor) -> Tensor:
        """[batch, head, key, d] of a cache."""
        cache = cached_v(self.model, v.shape[2])
        group = N_HEADS // cache.shape[1]
        return cache.permute(1, 0, 2).repeat_interleave(group, 0)[None].expand_as(v)

    def _slack(self) -> Slack:
        if self.case.dtype == "float32" and self.case.mode != "autocast":
            scores = (2e-6 * float(_finite(a.w).abs().max()) + 2e-5 for a in self.clean.attentions)
            return Slack(tuple(scores), 2e-5 * float(self.clean.logits.abs().max()) + 1e-4)
        low = torch.autocast("cpu", torch.bfloat16, enabled=self.case.mode == "autocast")
        with low:
            own = self.run(hf=self.model.plain)
        scores = tuple(
            2 * float(_finite(a.w - b.w).abs().max()) + 1e-3
            for a, b in zip(own.attentions, self.clean.attentions, strict=True)
        )
        return Slack(scores, 2 * float((own.logits - self.clean.logits).abs().max()))

    def rows(self, index: int, prompt: int, clean: oracle.Pass | None = None) -> oracle.Rows:
        """Of one attention, without padding."""
        queries, keys = self.spans(index)
        return oracle.unpacked(
            (clean or self.clean).attentions[index],
            prompt,
            range(*queries[prompt]),
            range(*keys[prompt]),
            scale=self.kind.scale,
            biased=self.kind.biased,
            cap=self.kind.cap,
            near=self.slack.scores[index],
        )

    def spans(self, index: int) -> tuple[Any, Any]:
        """Real columns of an attention's queries and keys."""
        source, target = self.what.spans, self.what.decoder_spans
        if not target:
            return source, source
        encoder = len(self.clean.attentions) // 3
        if index < encoder:
            return source, source
        return target, source if (index - encoder) % 2 else target

    def crossed(self, index: int) -> bool:
        return self.spans(index)[0] is not self.spans(index)[1]

    def firsts(self, index: int, prompt: int) -> tuple[int, ...]:
        """Keys that are a document's first token."""
        return (0,) if self.spans(index)[1] is not self.what.spans else self.what.firsts[prompt]

    @property
    def n_prompts(self) -> int:
        return len(self.what.spans)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite() & (x.abs() < -oracle.HIDDEN), x, 0.0)


def _both(a: oracle.Edits, b: oracle.Edits) -> oracle.Edits:
    """First b's, then a's."""
    out: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {}
    for edits in (b, a):
        for index, named in edits.items():
            for name, edit in named.items():
                first = out.setdefault(index, {}).get(name)
                out[index][name] = edit if first is None else _then(first, edit)
    return out


def _then(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda x: second(first(x))


def noise_edits(truth: Truth, noise: hooks.NormNoise, first_prompt: int = 0) -> oracle.Edits:
    """The factors of `NormNoise`, on the operands of every attention."""
    edits: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {}
    group = N_HEADS // truth.model.n_kv_heads

    def scaling(role: Any, index: int, spans: Any) -> Callable[[Tensor], Tensor]:
        def scale(x: Tensor) -> Tensor:
            factor = noise.factors(
                layer=index,
                role=role,
                n_heads=N_HEADS if role == "q" else truth.model.n_kv_heads,
                prompts=range(first_prompt, first_prompt + len(x)),
                n_pos=x.shape[2],
                start=[-first for first, _ in spans],
            ).double()
            if role != "q":
                factor = factor.repeat_interleave(group, 2)
            return x * factor.transpose(1, 2)[..., None]

        return scale

    for index in range(len(truth.clean.attentions)):
        queries, keys = truth.spans(index)
        edits[index] = {
            role: scaling(role, index, queries if role == "q" else keys) for role in noise.roles
        }
    return edits
