"""Make a shipped checkpoint: ``python -m qkvnorm_lens.checkpoints.make addition-pre --out runs/addition-pre``.

Trains (or goes on with the run that the directory holds), measures, and writes weights, configuration,
tokenizer, card and log in the form that `load_checkpoint` reads.
"""

from __future__ import annotations

from typing import Final

from qkvnorm_lens.config import named_config
from qkvnorm_lens.training import Run

RUNS: Final[dict[str, Run]] = {
    "addition-pre": Run(
        named_config("small", "pre"), "small-train", "modern", steps=10_000, seed=0, bf16=True
    ),
}
