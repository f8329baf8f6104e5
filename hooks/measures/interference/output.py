"""What the model's output loses when one layer's norm is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.measures.sweep import scored_places, scored_targets
from hooks.model import HookedModel, ModelInput, Prompts, checked_logits, run_with
from hooks.sites import Hook


class Output:
    """Clean logits of a batch, and others compared with them at the scored positions."""

    def __init__(
        self, model: HookedModel, prompts: Prompts, targets: Any, example: ModelInput
    ) -> None:
        self.model = model
        self.wanted = scored_targets(model, prompts, targets, example)
        n = len(prompts)
        self.positions = np.zeros(n, np.int64)
        self.targets = np.zeros(n, np.int64)
        self.clean_loss = np.zeros(n)
        self._clean: list[Float[Tensor, "place d_vocab"]] = []

    def clean(self, prompts: Prompts, indices: Sequence[int]) -> None:
        """A pass of the model as it is."""
        self._clean = []
        for logits, index in zip(self._run(prompts, ()), indices, strict=True):
            places, wanted = scored_places(self.wanted[index], index, len(logits))
            log_p = torch.log_softmax(logits[places].double(), -1)
            self._clean.append(log_p)
            self.positions[index] = len(places)
            if self.wanted[index] is not None:
                self.targets[index] = len(places)
                self.clean_loss[index] = self._loss(log_p, wanted)

    def compare(
        self, prompts: Prompts, indices: Sequence[int], hooks: Sequence[Hook]
    ) -> dict[str, Float[np.ndarray, "batch"]]:
        """Sums over each prompt's scored positions with these hooks on."""
        out = {name: np.zeros(len(indices)) for name in ("kl", "agree", "loss")}
        for row, (logits, index) in enumerate(zip(self._run(prompts, hooks), indices, strict=True)):
            places, wanted = scored_places(self.wanted[index], index, len(logits))
            log_q, log_p = torch.log_softmax(logits[places].double(), -1), self._clean[row]
            out["kl"][row] = float((log_p.exp() * (log_p - log_q)).sum())
            out["agree"][row] = int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            if self.wanted[index] is not None:
                out["loss"][row] = self._loss(log_q, wanted)
        return out

    def forget(self) -> None:
        """Free the clean logits."""
        self._clean = []

    def _run(self, prompts: Prompts, hooks: Sequence[Hook]) -> Float[Tensor, "batch pos d_vocab"]:
        given = prompts.batch(range(len(prompts)))
        with torch.no_grad():
            logits = checked_logits(run_with(self.model, given, hooks))
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("logits: wanted finite numbers; got NaN or inf")
        return logits

    @staticmethod
    def _loss(log_p: Tensor, wanted: Tensor) -> float:
        return -float(log_p.gather(1, wanted.to(log_p.device)[:, None]).sum())
