"""Reports that the build before the house was rebuilt had saved (commit c5f1020), one of a kind."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import hooks
from tests.support.paths import DATA

FOLDER = DATA / "reports_before"
KINDS = {
    "collapse": hooks.CollapseReport,
    "sweep": hooks.SweepReport,
    "spread": hooks.SpreadReport,
    "interference": hooks.InterferenceReport,
    "rank": hooks.RankReport,
    "spectrum": hooks.SpectrumReport,
    "symmetry": hooks.SymmetryReport,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_report_of_the_build_before_loads_with_its_numbers(name: str, tmp_path: Path) -> None:
    """Standard errors apart: they were bootstrapped then, and follow from the sums now."""
    report = KINDS[name].load(FOLDER / f"{name}.safetensors")
    then, now = pd.read_csv(FOLDER / f"{name}.csv"), report.to_frame()
    kept = [c for c in then.columns if c != "se" and not c.startswith("se_")]
    assert [c for c in now.columns if c in then.columns] == list(then.columns)
    pd.testing.assert_frame_equal(
        now[kept].reset_index(drop=True), then[kept], check_exact=True, check_dtype=False
    )
    report.save(tmp_path / "again.safetensors")
    again = KINDS[name].load(tmp_path / "again.safetensors")
    pd.testing.assert_frame_equal(again.to_frame(), report.to_frame(), check_exact=True)


def test_every_kind_of_report_is_held() -> None:
    public = {name for name in hooks.__all__ if name.endswith("Report")}
    assert {kind.__name__ for kind in KINDS.values()} == public
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {*KINDS}
