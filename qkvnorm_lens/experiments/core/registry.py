"""The experiments by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from qkvnorm_lens.arguments import check_name

if TYPE_CHECKING:
    from qkvnorm_lens.experiments.core.base import Experiment

GROUPS: Final = {
    "accuracy": "paper",
    "spread": "paper",
    "noise": "paper",
    "collapse": "paper",
    "sparsity": "paper",
    "stability": "paper",
    "theorems": "paper",
    "interference": "beyond",
    "gauge": "beyond",
    "confound": "beyond",
    "quantisation": "beyond",
    "rank": "related",
    "masks": "related",
    "spectrum": "related",
    "centring": "related",
    "symmetry": "related",
    "positions": "related",
}
"""The folder of each: the paper's figures in its order, what goes beyond it, related papers."""
NAMES: Final = tuple(GROUPS)


def get_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: no such name; the message lists them.
        ImportError: a package that experiments need is missing.
    """
    name = check_name("name", name, NAMES)
    try:
        module = importlib.import_module(f"qkvnorm_lens.experiments.{GROUPS[name]}.{name}")
    except ModuleNotFoundError as error:
        if error.name in ("scipy", "matplotlib"):
            raise ImportError(
                f"experiments want {error.name}, which is not installed: "
                "pip install 'qkvnorm-lens[experiments]'"
            ) from error
        raise
    experiment: Experiment = module.EXPERIMENT
    return experiment
