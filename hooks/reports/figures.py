"""A report's figure, drawn by whoever is installed and says that it can.

`hooks` draws nothing itself. A package that draws its reports says so in its metadata: entry points
of the group ``hooks.figures``, by a report's class, each a function of the report.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

GROUP = "hooks.figures"


def figure_of(report: Any, options: dict[str, Any]) -> Any:
    """See :meth:`hooks.reports.SavedReport.plot`."""
    kind = type(report).__name__
    found = [entry for entry in entry_points(group=GROUP) if entry.name == kind]
    if not found:
        raise ImportError(
            f"plot: wanted a package installed that draws a {kind} (the entry points "
            f"{GROUP!r}); got none: pip install 'qkvnorm-lens[plots]'"
        )
    return found[0].load()(report, **options)
