"""The exact collapse probe."""

from hooks.collapse.kept import KeptRows
from hooks.collapse.probe import DEFAULT_SIGMAS, _check_sparse, _sigmas, collapse_probe
from hooks.collapse.report import (
    CONTENT,
    SINK,
    By,
    CollapseReport,
    ProbeSettings,
    RowTable,
    _se_prompts,
)
from hooks.collapse.showing import DRAWS

__all__ = [
    "By",
    "CONTENT",
    "CollapseReport",
    "DEFAULT_SIGMAS",
    "DRAWS",
    "KeptRows",
    "ProbeSettings",
    "RowTable",
    "SINK",
    "_check_sparse",
    "_se_prompts",
    "_sigmas",
    "collapse_probe",
]
