"""The exact collapse probe."""

from hooks.collapse.form import FORM
from hooks.collapse.kept import KeptRows
from hooks.collapse.pool import Pool
from hooks.collapse.probe import (
    DEFAULT_SIGMAS,
    check_sparse,
    collapse_probe,
    read_grid,
    read_options,
    tell_if_compiling,
)
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
    "Pool",
    "ProbeSettings",
    "RowTable",
    "SINK",
    "check_sparse",
    "read_grid",
    "read_options",
    "collapse_probe",
    "tell_if_compiling",
]
