"""``qkvnorm-lens cache``: what it prints and writes is the library's own report and recipe."""

from __future__ import annotations

from pathlib import Path

import hooks
from qkvnorm_lens import load_checkpoint
from qkvnorm_lens.text import sums
from tests.support.commands import Run, refused

FEW = ["--prompts", "4", "--formats", "q8_0,q4_0,full", "--samples", "1"]


def test_it_writes_report_page_and_recipe(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "cache"
    code, said, _ = run("cache", "addition-pre", *FEW, "--bits", "6", "--out", str(out))
    assert code == 0
    report = hooks.CacheRisk.load(out / "report.safetensors")
    recipe = hooks.CacheRecipe.load(out / "recipe.json")
    assert report.settings.formats == ("q8_0", "q4_0")
    assert recipe == report.recipe(6.0, formats=["q8_0", "q4_0", "full"])
    assert str(recipe) in said
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert all(engine in (out / "engines.txt").read_text() for engine in ("vllm", "kvtuner"))
    ids = sums("small-train", 4, seed=0).ids
    again = hooks.cache_risk(load_checkpoint("addition-pre"), ids, formats=["q8_0"], samples=0)
    assert (report.moved[0] == again.moved[0]).all()


def test_a_mixture_that_no_engine_takes_is_said_to_be_one(run: Run, tmp_path: Path) -> None:
    mixed = ["--prompts", "4", "--samples", "1", "--formats", "q8_0,quanto-int4", "--bits", "6.5"]
    code, said, _ = run("cache", "addition-pre", *mixed, "--out", str(tmp_path))
    assert code == 0
    assert "No engine that we know takes this mixture" in said
    assert "No engine that we know takes this mixture" in (tmp_path / "report.html").read_text()
    code, said, _ = run("cache", "addition-pre", *mixed[:4], "--formats", "q8_0", "--bits", "9")
    assert "No engine" not in said


def test_what_it_refuses(run: Run, tmp_path: Path) -> None:
    refused(run("cache", "addition-pre", *FEW, "--bits", "3"), "bits: wanted 4.5 or more")
    refused(run("cache", "addition-pre", "--prompts", "2", "--formats", "q4"), "q4_0")
