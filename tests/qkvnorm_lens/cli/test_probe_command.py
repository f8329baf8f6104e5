"""``qkvnorm-lens probe`` on an addition model: what it prints and writes is what Python gives."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import hooks
from qkvnorm_lens import tables
from qkvnorm_lens.cli import output
from qkvnorm_lens.training.addition import VOCAB
from tests.support.commands import SUMS, Run, refused


def test_probe_prints_tables(printed: str, wanted: hooks.CollapseReport) -> None:
    assert wanted.n_sparse > 50
    assert printed.startswith(wanted.summary())
    rates, rest = printed.split("Share of sparse rows")[1].split("Heads, most fragile first")
    lines = [line.split() for line in rates.splitlines()]
    assert [line[0] for line in lines[2:4]] == ["40%", "50%"]
    loose = wanted.to_frame("model")["loose"].iloc[1]
    assert lines[3][1] == f"{100 * loose:.3g}"
    first = wanted.heads(tables.RATE, min_rows=tables.MIN_ROWS).iloc[0]
    assert rest.splitlines()[2].split()[:2] == [
        f"L{first['layer']:.0f}H{first['head']:.0f}",
        tables.percent(first["sigma_at"]),
    ]
    row = wanted.fragile(1).iloc[0]
    listed = rest.split("Most fragile rows")[1].splitlines()[2]
    assert listed.split()[0] == tables.percent(row["sigma"])
    assert f'{row["jump_pos"]} "{row["jump_token"]}"' in listed
    assert "".join(wanted.tokens[row["prompt"]][: row["query_pos"] + 1]) in listed


def test_json_is_what_python_gives(run: Run, wanted: hooks.CollapseReport) -> None:
    code, out, err = run(*SUMS, "--json", "--fragile", "7")
    assert (code, err) == (0, "")
    told = json.loads(out)
    for key, frame in (("rates", wanted.to_frame("model")), ("fragile", wanted.fragile(7))):
        given = pd.DataFrame(told[key], columns=list(frame.columns))
        pd.testing.assert_frame_equal(given.astype(frame.dtypes), frame)
    by_head = wanted.sigma_at(0.01, by="head")
    assert isinstance(by_head, pd.DataFrame)
    ranked = wanted.heads(0.01, min_rows=0)
    assert [h["label"] for h in told["heads"]] == list(ranked["label"])
    for head in told["heads"]:
        value = by_head.loc[head["layer"], head["head"]]
        if head["sigma_at"] is None:  # never, or no rows
            assert not np.isfinite(value)
            assert np.isinf(value) == (head["rows"] > 0)
        else:
            assert head["sigma_at"] == value
    assert told["sigma_at"]["model"] == wanted.sigma_at(0.01)
    assert told["sigma_at"]["content"] == wanted.sigma_at(0.01, content=True)
    assert told["rows"]["sparse"] == wanted.n_sparse
    assert told["settings"]["sigmas"] == [0.4, 0.5]
    assert told["model"] == wanted.model
    assert told["summary"] == wanted.summary()


def test_out_writes_everything_and_the_report_loads(
    run: Run, tmp_path: Path, printed: str, wanted: hooks.CollapseReport
) -> None:
    folder = tmp_path / "new" / "folder"
    page = f"\nThis and more, to open in a browser: {folder / 'report.html'}\n"
    assert run(*SUMS, "--out", str(folder)) == (0, printed + page, "")
    assert run(*SUMS, "--out", str(folder), "--json")[1].endswith("}\n")
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "report.safetensors",
        "frame.csv",
        "summary.txt",
        "collapse.png",
        "heads.png",
        "rows.png",
    }
    run(*SUMS, "--out", str(folder), "--format", "pdf,svg")  # other formats are another run's
    assert {p.name for p in folder.glob("heads.*")} == {"heads.pdf", "heads.svg"}
    run(*SUMS, "--out", str(folder))
    assert {p.name for p in folder.glob("heads.*")} == {"heads.png"}
    report = hooks.CollapseReport.load(folder / "report.safetensors")
    pd.testing.assert_frame_equal(report.to_frame(), wanted.to_frame())
    pd.testing.assert_frame_equal(pd.read_csv(folder / "frame.csv"), wanted.to_frame())
    assert (folder / "summary.txt").read_text(encoding="utf-8") == printed
    assert (folder / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_a_probe_that_fails_leaves_no_directory(run: Run, tmp_path: Path, mamba_dir: str) -> None:
    new, there = tmp_path / "new", tmp_path / "there"
    there.mkdir()
    for folder in (new, there):
        code, out, err = run("probe", mamba_dir, "--text", "12+34", "--out", str(folder))
        assert (code, out) == (1, "")
        assert "attention" in err
    assert not new.exists()
    assert there.exists()


def test_without_matplotlib_only_the_figures_are_missing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output.figures.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(*SUMS, "--out", str(tmp_path))
    assert code == 0
    assert "pip install 'qkvnorm-lens[plots]'" in err
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".csv", ".txt", ".html"}


def test_lines_of_sums(run: Run, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sums = "[12+34-N5=51\n\n  [7-9=N2\n"
    ids = [[VOCAB.index(c) for c in row] for row in ("[12+34-N5=51", "[7-9=N2")]
    refused(run("probe", "--text", sums), "enough")
    assert seen["tokens"] == ids
    monkeypatch.setattr(sys, "stdin", io.StringIO(sums))
    run("probe", "--file", "-")
    assert seen["tokens"] == ids
    _, _, err = run("probe", "--text", sums, "--prompts", "1")
    assert "1 of 2 lines left out" in err
    assert seen["tokens"] == ids[:1]


def test_a_directory_of_ours(run: Run, ours_dir: str, printed: str) -> None:
    argv = ["probe", ours_dir, *SUMS[1:]]
    refused(run(*argv), "--split")
    code, out, _ = run(*argv, "--split", "small-train")
    assert code == 0
    assert out.splitlines()[1:] == printed.splitlines()[1:]  # but the name


def test_every_option_reaches_the_probe(run: Run, seen: dict[str, Any]) -> None:
    argv = ["--method", "sample", "--layers", "0,2-3", "--law", "lognormal", "--shared", "heads"]
    argv += ["--on", "k", "--sparse", "0.9", "--seed", "3", "--draws", "5", "--sigmas", "1%"]
    rest = ["--batch-size", "2", "--prompts", "9", "--keep", "7", "--no-strict"]
    rest += ["--engine", "compiled"]
    refused(run("probe", *argv, *rest), "enough")
    assert len(seen.pop("tokens")) == 9
    assert seen == {
        "sigmas": [0.01],
        "on": "k",
        "law": "lognormal",
        "method": "sample",
        "shared": "heads",
        "sparse": 0.9,
        "layers": [0, 2, 3],
        "strict": False,
        "draws": 5,
        "seed": 3,
        "batch_size": 2,
        "keep": 7,
        "engine": "compiled",
    }
    run("probe")
    assert len(seen["tokens"]) == 128
    assert seen["batch_size"] > 8


def test_noise_that_never_moves_an_arg_max(run: Run) -> None:
    code, out, _ = run(*SUMS, "--on", "v")
    assert code == 0
    assert "never moves an arg max" in out
    assert "most fragile" not in out


def test_no_sparse_rows_is_said(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(*SUMS, "--sparse", "1", "--out", str(tmp_path))
    assert code == 0
    assert "No sparse row" in out
    assert "Share of sparse rows" not in out
    assert (tmp_path / "heads.png").exists()
    assert not (tmp_path / "rows.png").exists()


def test_bfloat16(run: Run) -> None:
    code, out, _ = run(*SUMS, "--dtype", "bfloat16", "--json")
    assert code == 0
    assert json.loads(out)["model"]["dtype"] == "bfloat16"
