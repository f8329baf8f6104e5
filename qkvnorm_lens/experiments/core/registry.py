"""The experiments by name."""

from __future__ import annotations

import importlib
import importlib.util
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
    "lengths": "beyond",
    "gauge": "beyond",
    "confound": "beyond",
    "quantisation": "beyond",
    "caches": "beyond",
    "language": "beyond",
    "atlas": "beyond",
    "rank": "related",
    "masks": "related",
    "spectrum": "related",
    "centring": "related",
    "symmetry": "related",
    "positions": "related",
}
"""The folder of each: the paper's figures in its order, what goes beyond it, related papers."""
NAMES: Final = tuple(GROUPS)


def check_installed() -> None:
    """Refuse to run an experiment, for hours perhaps, whose results could not be drawn.

    Raises:
        ImportError: a package that experiments need is missing.
    """
    for package in ("scipy", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"experiments want {package}, which is not installed: "
                "pip install 'qkvnorm-lens[experiments]'"
            )


def get_experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: no such name; the message lists them.
    """
    name = check_name("name", name, NAMES)
    module = importlib.import_module(f"qkvnorm_lens.experiments.{GROUPS[name]}.{name}")
    experiment: Experiment = module.EXPERIMENT
    return experiment
