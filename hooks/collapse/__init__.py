"""The exact collapse probe."""

from hooks.collapse.form import FORM
from hooks.collapse.kept import KeptRows
from hooks.collapse.probe import DEFAULT_SIGMAS, check_sparse, collapse_probe, read_grid
from hooks.collapse.report import CollapseReport
from hooks.collapse.settings import CONTENT, SINK, By, ProbeSettings
from hooks.collapse.showing import DRAWS
from hooks.collapse.table import RowTable

__all__ = [
    "By",
    "CONTENT",
    "CollapseReport",
    "DEFAULT_SIGMAS",
    "DRAWS",
    "FORM",
    "KeptRows",
    "ProbeSettings",
    "RowTable",
    "SINK",
    "check_sparse",
    "read_grid",
    "collapse_probe",
]
