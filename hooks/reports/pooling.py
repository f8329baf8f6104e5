"""Reports whose prompts are pooled: sums over all of them in place of sums for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_type_hints

import numpy as np
from jaxtyping import Int

from hooks.reports.base import CorpusReport, one_model


def prompt_axes(report: type) -> dict[str, int]:
    """Arrays of a report with an axis of prompts, and which axis that is."""
    kinds = {
        n: k.dim_str.split() for n, k in get_type_hints(report).items() if hasattr(k, "dim_str")
    }
    return {name: axes.index("prompt") for name, axes in kinds.items() if "prompt" in axes}


class PoolingReport(CorpusReport):
    """A report of sums over each prompt that can be pooled: its size is then constant.

    ``settings.pooled`` says whether it is; of the prompts' tokens only their number stays.
    """

    def pooled(self: Any) -> Any:
        """This report with sums over all prompts in place of sums for each.

        Rates and standard errors stay; tokens, and what is said of single prompts, do not.
        """
        if self.settings.pooled:
            return self
        axes = prompt_axes(type(self))
        arrays = {n: getattr(self, n).sum(at, keepdims=True) for n, at in axes.items()}
        return replace(
            self,
            settings=replace(self.settings, pooled=True),
            first_prompt=0,
            tokens=((),) * len(self.tokens),
            decoder_tokens=(),
            **arrays | self._over_prompts(),
        )

    def _over_prompts(self) -> dict[str, np.ndarray]:
        """What a pooled report has beside sums: the moments of its standard errors."""
        raise NotImplementedError

    def placed(self: Any, places: Int[np.ndarray, "prompt"], n: int) -> Any:
        """This shard's report, as that of ``n`` prompts, some of which are its own."""
        return replace(self, tokens=((),) * n)

    def alongside(self: Any, later: Any) -> Any:
        """The sums of two parts, pooled, of as many prompts as this one has.

        Raises:
            ValueError: other settings, or another model.
        """
        one_model(self, later)
        added = {
            name: getattr(self, name) + getattr(later, name)
            for name, kind in get_type_hints(type(self)).items()
            if hasattr(kind, "dim_str")
        }
        return replace(self, **added)
