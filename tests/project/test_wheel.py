"""The wheel in an environment of what pip would install with it, and nothing else.

The environment holds the built wheel and, as links, the distributions that its requirements ask
for, followed from one to the next as pip does: what no extra asks for is not there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

PLOTTING, NUMERICS = ("matplotlib", "plotly", "circuitsvis"), ("scipy",)
# What stands in each environment, by the extra that was asked for.
THERE = {"": (), "plots": PLOTTING, "experiments": PLOTTING + NUMERICS}
EXTRAS = tuple(THERE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(to), str(ROOT)], check=True)
    (built,) = to.glob("qkvnorm_lens-*.whl")
    return built


def needed(wheel: Path, extra: str) -> dict[str, Distribution]:
    """Distributions that pip would install, from the wheel's own metadata on."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    asked = [(Requirement(line), extra) for line in metadata(wheel).get_all("Requires-Dist", [])]
    while asked:
        requirement, of = asked.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in requirement.extras or {""}:
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            if name == "qkvnorm-lens":  # an extra of its own
                lines = metadata(wheel).get_all("Requires-Dist", [])
                asked += [(Requirement(line), wanted) for line in lines]
                continue
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:  # e.g. of another platform
                continue
            asked += [(Requirement(line), wanted) for line in found[name].requires or ()]
    return found


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; one for all, as its code takes a minute to compile."""
    made = tmp_path_factory.mktemp("env")
    venv.create(made, with_pip=False, symlinks=True)
    command = [sys.executable, "-m", "pip", "--python", str(made / "bin" / "python"), "install"]
    options = ["-q", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*command, *options, str(wheel)], check=True)
    return made


@pytest.fixture(scope="module", params=EXTRAS)
def extra(wheel: Path, folder: Path, request: pytest.FixtureRequest) -> str:
    """What was asked for; it is there now, and no other."""
    (site,) = (folder / "lib").glob("python*/site-packages")
    for path in site.iterdir():
        if path.is_symlink():
            path.unlink()
    for found in needed(wheel, request.param).values():
        tops = {file.parts[0] for file in found.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    return str(request.param)


def run(folder: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "QKVNORM"))}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = [str(folder / "bin" / command[0]), *command[1:]]
    return subprocess.run(path, cwd=cwd, env=kept, capture_output=True, text=True)


def said(folder: Path, *command: str, cwd: Path) -> str:
    done = run(folder, *command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_what_was_asked_for_is_there(folder: Path, extra: str, tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, json, sys, hooks, qkvnorm_lens;"
        "there = {n: bool(u.find_spec(n)) for n in sys.argv[1:]};"
        "print(json.dumps([hooks.__file__, qkvnorm_lens.__file__, there]))"
    )
    names = [*PLOTTING, *NUMERICS, "pytest", "mypy", "playwright", "mkdocs"]
    *files, there = json.loads(said(folder, "python", "-c", code, *names, cwd=tmp_path))
    assert all(Path(file).is_relative_to(folder) for file in files)
    assert {name for name, yes in there.items() if yes} == set(THERE[extra])


def test_the_commands_run(folder: Path, extra: str, tmp_path: Path) -> None:
    here, kept = folder, {"cwd": tmp_path}
    assert "addition-pre" in said(here, "qkvnorm-lens", "models", **kept)
    assert "spectrum" in said(here, "qkvnorm-lens", "experiment", "list", **kept)
    done = run(here, "qkvnorm-lens", "probe", "--prompts", "16", "--out", "out", **kept)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    always = {"report.html", "report.safetensors", "frame.csv", "summary.txt"}
    figures = {"collapse.png", "heads.png", "rows.png"}
    assert written == always | (figures if extra else set())
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("CircuitsVis" in page) == bool(extra)
    assert ("pip install 'qkvnorm-lens[plots]'" in done.stderr) == (not extra)
    assert "wrote" in said(here, "qkvnorm-lens", "report", "out", **kept)


def test_figures_and_experiments_run_or_name_their_extra(
    folder: Path, extra: str, tmp_path: Path
) -> None:
    code = (
        "import hooks; from qkvnorm_lens import load_checkpoint;"
        "r = hooks.collapse_probe(load_checkpoint('addition-pre'), ['[12+34=46'], sigmas=[.1, .3]);"
        "print(len(r.heads(min_rows=1)), len(r._repr_html_()) > 500, flush=True); r.plot()"
    )
    done = run(folder, "python", "-c", code, cwd=tmp_path)
    assert done.stdout.endswith("True\n"), done.stderr
    last = (done.stderr.splitlines() or [""])[-1]
    assert (done.returncode == 0) == bool(extra), done.stderr
    assert bool(extra) or re.match(r"ImportError: .*pip install 'qkvnorm-lens\[plots\]'", last)
    experiment = ["qkvnorm-lens", "experiment", "sparsity", "--smoke", "--out", "out"]
    done = run(folder, *experiment, cwd=tmp_path)
    assert (done.returncode == 0) == (extra == "experiments"), done.stderr
    if extra != "experiments":
        assert "pip install 'qkvnorm-lens[experiments]'" in done.stderr


def test_the_wheel_is_small_and_names_what_makes_the_experiments_models(
    wheel: Path, folder: Path, extra: str, tmp_path: Path
) -> None:
    """The three shipped models are in it, those of the experiments are not."""
    assert wheel.stat().st_size < 8e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    weights = [name for name in names if name.endswith(".safetensors")]
    assert [name.split("/")[-2] for name in weights] == [
        "addition-none",
        "addition-pre",
        "addition-qkv",
    ]
    command = "python -m qkvnorm_lens.experiments.train"
    assert command in said(folder, "qkvnorm-lens", "models", cwd=tmp_path)
    done = run(folder, "qkvnorm-lens", "probe", "study-pre-1", cwd=tmp_path)
    assert done.returncode == 1
    assert f"`{command} study-pre-1` makes them" in done.stderr
    if extra == "experiments":
        for name in ("language", "positions", "confound", "centring"):
            done = run(folder, "qkvnorm-lens", "experiment", name, "--smoke", cwd=tmp_path)
            assert done.returncode == 1
            assert command in done.stderr


def test_the_metadata_says_what_it_is(wheel: Path) -> None:
    told = metadata(wheel)
    assert told["License-Expression"] == "MIT"
    assert told["Project-URL"]
    assert told["Description-Content-Type"] == "text/markdown"
    versions = {c for c in told.get_all("Classifier") if re.search(r":: 3\.\d+$", c)}
    assert versions == {f"Programming Language :: Python :: 3.{n}" for n in (10, 11, 12, 13)}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"hooks/py.typed", "qkvnorm_lens/py.typed", "qkvnorm_lens/page/page.js"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hooks", "qkvnorm_lens"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".nbi")]
