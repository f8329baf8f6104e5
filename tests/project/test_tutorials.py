"""The tutorials: they run, and what is stored of them can be shown and reviewed anywhere."""

from __future__ import annotations

import ast
import base64
import re
import subprocess
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nbformat
import pytest

from tests.support.paths import ROOT
from tutorials import build

each_script = pytest.mark.parametrize("script", build.SCRIPTS, ids=lambda path: path.stem)
PNG = b"\x89PNG\r\n\x1a\n"


def stored(script: Path) -> Any:
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def codes(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in codes(notebook) for output in cell.outputs]


def shown(output: Any) -> str:
    """What of an output is text."""
    if output.output_type == "stream":
        return str(output.text)
    return "\n".join(str(v) for kind, v in output.data.items() if kind.startswith("text/"))


def test_there_are_seven_and_nothing_else() -> None:
    assert [s.name[:2] for s in build.SCRIPTS] == [f"{n:02d}" for n in range(1, 8)]
    notebooks = sorted(build.HERE.rglob("*.ipynb"))
    notebooks = [path for path in notebooks if ".ipynb_checkpoints" not in path.parts]
    assert notebooks == [script.with_suffix(".ipynb") for script in build.SCRIPTS]


# -- what is stored --------------------------------------------------------------------------


@each_script
def test_script_and_notebook_agree(script: Path) -> None:
    written, kept = build.read(script), stored(script)
    assert [(c.cell_type, c.source) for c in written.cells] == [
        (c.cell_type, c.source) for c in kept.cells
    ], f"{script.name} was changed: make tutorials ARGS={script.name[:2]}"
    assert kept.metadata == written.metadata


@each_script
def test_every_cell_was_run_in_order_without_a_complaint(script: Path) -> None:
    notebook = stored(script)
    assert [c.execution_count for c in codes(notebook)] == [*range(1, len(codes(notebook)) + 1)]
    for output in outputs(notebook):
        assert output.output_type in ("stream", "display_data", "execute_result"), output
        assert output.get("name") != "stderr", output.get("text")


@each_script
def test_figures_are_stored_as_pictures(script: Path) -> None:
    """And nothing that a code host would leave blank."""
    pictures = 0
    for output in outputs(stored(script)):
        for kind, data in output.get("data", {}).items():
            assert kind in ("image/png", "text/html", "text/markdown", "text/plain")
            if kind == "image/png":
                assert base64.b64decode(data).startswith(PNG)
                pictures += 1
            else:
                assert not re.search(r"<(script|iframe)", data)
    assert pictures >= 2
    assert script.with_suffix(".ipynb").stat().st_size < 1.5e6


@each_script
def test_no_path_of_a_machine_is_stored(script: Path) -> None:
    for output in outputs(stored(script)):
        text = shown(output)
        for path in (str(Path.home()), str(ROOT), "/tmp/", "/usr/", "site-packages"):
            assert path not in text, text[:400]


@each_script
def test_cells_check_what_the_text_states(script: Path) -> None:
    """Assertions that hang on something: none of them is about constants alone."""
    found = 0
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Assert):
            assert any(isinstance(n, ast.Name) for n in ast.walk(node.test)), ast.unparse(node)
            found += 1
        elif isinstance(node, ast.Call) and "assert" in ast.unparse(node.func):
            found += 1
    assert found >= 8


@each_script
def test_links_lead_to_files(script: Path) -> None:
    text = "\n".join(c.source for c in build.read(script).cells if c.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if "://" not in link]
    assert any(link.endswith(".ipynb") for link in local), "a way on to another tutorial"
    for link in local:
        assert (build.HERE / unquote(link)).exists(), link


@each_script
def test_it_begins_with_a_title_and_the_colab_cell(script: Path) -> None:
    first, second = build.read(script).cells[:2]
    assert re.match(rf"# {int(script.name[:2])} · \S", first.source)
    assert second.source == colab_cell()


def colab_cell() -> str:
    return str(build.read(build.SCRIPTS[0]).cells[1].source)


# -- Colab -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["release", "repository"])
def test_the_colab_cell_installs_and_goes_to_the_tutorials(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip itself is left out: it puts what it would, a sdist or an archive of a repository."""
    calls: list[list[str]] = []

    def pip(command: list[str], *, check: bool = False) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        done = subprocess.CompletedProcess[str](command, 0)
        if command[3] != "download":
            assert check
            return done
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        (tmp_path / "build.py").write_text("")
        if kind == "release":
            with tarfile.open(folder / "qkvnorm_lens-0.1.0.tar.gz", "w:gz") as archive:
                archive.add(tmp_path / "build.py", "qkvnorm_lens-0.1.0/tutorials/build.py")
        else:
            with zipfile.ZipFile(folder / "qkvnorm-lens-0.1.0.zip", "w") as archive:
                archive.write(tmp_path / "build.py", "qkvnorm-lens/tutorials/build.py")
        return done

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", pip)
    monkeypatch.setitem(__import__("sys").modules, "google.colab", types.ModuleType("colab"))
    exec(compile(colab_cell(), "cell", "exec"), {})
    assert [call[3] for call in calls] == ["download", "install"]
    assert Path("build.py").is_file()
    assert Path.cwd().name == "tutorials"
    installed = calls[1][-1].removesuffix("[experiments]")
    assert Path(installed) == Path.cwd().parent


def test_where_nothing_is_found_the_colab_cell_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess[str]([], 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.run", lambda command, **_: failed)
    monkeypatch.setitem(__import__("sys").modules, "google.colab", types.ModuleType("colab"))
    with pytest.raises(RuntimeError, match="pip finds no 'qkvnorm-lens': set SOURCE"):
        exec(compile(colab_cell(), "cell", "exec"), {})


def test_elsewhere_the_colab_cell_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **options: object) -> None:
        raise AssertionError(f"called with {args}")

    monkeypatch.setattr("subprocess.run", refused)
    here = Path.cwd()
    exec(compile(colab_cell(), "cell", "exec"), {})
    assert Path.cwd() == here


# -- building --------------------------------------------------------------------------------


def notebook_of(*cells: str) -> Any:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    return notebook


@pytest.mark.notebooks
def test_what_turns_is_not_stored() -> None:
    framed = (
        "class View:\n  def _repr_html_(self):\n    return '<iframe srcdoc=\"\"></iframe>'\nView()"
    )
    table = "import pandas\npandas.DataFrame({'a': [1]})"
    plotly = "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[1, 2]))"
    built = build.execute(notebook_of(framed, table, plotly))
    kinds = [[dict(o.data) for o in cell.outputs] for cell in built.cells]
    assert kinds[0] == kinds[2] == [{"text/plain": build.INTERACTIVE}]
    assert "<table" in kinds[1][0]["text/html"]


@pytest.mark.notebooks
def test_pieces_of_a_stream_are_joined() -> None:
    slow = "import time\nfor i in range(3):\n    print(i, flush=True)\n    time.sleep(0.5)"
    (cell,) = build.execute(notebook_of(slow)).cells
    assert [output.text for output in cell.outputs] == ["0\n1\n2\n"]


@pytest.mark.notebooks
def test_a_cell_that_fails_stops_the_build() -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="AssertionError"):
        build.execute(notebook_of("assert 1 + 1 == 3"))


@pytest.mark.notebooks
@pytest.mark.real_model
@each_script
def test_it_runs_from_top_to_bottom(script: Path, smollm2_dir: Path) -> None:
    """Offline; with the same output cells as the stored one, and no complaint."""
    run, kept = build.execute(build.read(script)), stored(script)
    for mine, theirs in zip(codes(run), codes(kept), strict=True):
        kinds = [
            [sorted(o.get("data", {o.get("name"): 0})) for o in c.outputs] for c in (mine, theirs)
        ]
        assert kinds[0] == kinds[1], mine.source
    assert not [o for o in outputs(run) if o.get("name") == "stderr"]
