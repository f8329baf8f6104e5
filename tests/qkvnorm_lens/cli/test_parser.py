"""The command line's parser agrees with the library, and what is wrong fails early."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import hooks
import qkvnorm_lens
from hooks.corpus.probe import KEEP
from hooks.noise import norm_noise as noise
from qkvnorm_lens.cli import build_parser, probe as probe_command
from tests.support.commands import Run, refused


def _action(name: str) -> Any:
    args = build_parser()
    (commands,) = (a for a in args._actions if a.choices and "probe" in a.choices)
    probe = commands.choices["probe"]
    return next(a for a in probe._actions if a.dest == name)


def test_choices_are_the_librarys() -> None:
    assert set(_action("law").choices) == set(hooks.LAWS)
    assert set(_action("shared").choices) == set(get_args(noise.Shared))
    assert set(_action("method").choices) == {"exact", "sample"}


@pytest.mark.parametrize(
    "name", ["on", "method", "law", "shared", "sparse", "strict", "draws", "seed", "engine"]
)
def test_defaults_are_the_librarys(name: str) -> None:
    assert _action(name).default == inspect.signature(hooks.collapse_probe).parameters[name].default


def test_keep_is_left_to_the_library_and_its_help_has_both_numbers() -> None:
    keep = _action("keep")
    assert keep.default is None
    of_prompts = inspect.signature(hooks.collapse_probe).parameters["keep"].default
    assert f"[{of_prompts}; a corpus: {KEEP}]" in keep.help


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0.01,0.05", [0.01, 0.05]),
        ("1%, 5%", [0.01, 0.05]),
        ("0.1:0.3:3", [0.1, 0.2, 0.3]),
        ("0%:50%:2", [0, 0.5]),
    ],
)
def test_sigmas(given: str, wanted: list[float]) -> None:
    assert probe_command.sigmas(given) == pytest.approx(wanted)


@pytest.mark.parametrize(("given", "wanted"), [("3", [3]), ("0,5-7", [0, 5, 6, 7])])
def test_layers(given: str, wanted: list[int]) -> None:
    assert probe_command.layers(given) == wanted


@pytest.mark.parametrize(
    "argv",
    [
        ["nothing"],
        ["probe", "--sigmas", "much"],
        ["probe", "--sigmas=-0.1"],
        ["probe", "--sigmas", "nan"],
        ["probe", "--sigmas", "inf"],
        ["probe", "--on", "x"],
        ["probe", "--on", "qq"],
        ["probe", "--draws", "-1"],
        ["probe", "--draws", "1e3"],
        ["probe", "--batch-size", "0"],
        ["probe", "--batch-size", str(2**70)],
        ["probe", "--sparse", "2"],
        ["probe", "--sparse", "nan"],
        ["probe", "--length", "1"],
        ["probe", "--keep", "0"],
        ["probe", "--out", ""],
        ["probe", "--prompts"],
        ["probe", "--json=yes"],
        ["probe", "addition-pre", "gpt2"],
        ["train"],
        ["train", "--out", "x", "--lr", "0"],
        ["train", "--out", "x", "--placement", "post"],
        ["experiment", "collapse", "--full", "--smoke"],
        ["probe", "--sigmas", "0.1:0.2"],
        ["probe", "--layers", "7-5"],
        ["probe", "--layers", "first"],
        ["probe", "--law", "cauchy"],
        ["probe", "--prompts", "0"],
        ["probe", "--seed", "-1"],
        ["probe", "--text", "a", "--file", "b"],
        ["models", "addition-pre"],
    ],
)
def test_wrong_usage_is_2(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"qkvnorm-lens: error: [^:]+: wanted .*; got .*\n", err)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["prob"], "probe"),
        (["modles"], "models"),
        (["Train"], "train"),
        (["probe", "--sigam", "0.1"], "--sigmas"),
        (["probe", "--sigma=0.1"], "--sigmas"),
        (["probe", "--no-sink"], "--no-sinks"),
        (["probe", "--law", "unifrom"], "uniform"),
        (["probe", "--shared", "token s"], "token"),
        (["probe", "--dtype", "bfloat"], "bfloat16"),
        (["report", ".", "--ouput", "x"], "--out"),
        (["train", "--out", "x", "--recpie", "paper"], "--recipe"),
        (["experiment", "colapse"], "collapse"),
        (["experiment", "list", "--modle", "x"], "--model"),
    ],
)
def test_a_typo_gets_a_suggestion(run: Run, argv: list[str], meant: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.endswith(f"(did you mean {meant!r}?)\n")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("short", ["--sig", "--prompt", "--sp", "--dev", "--trace", "--o"])
def test_an_option_is_not_known_by_its_beginning(run: Run, short: str) -> None:
    """What another version adds must not change what a script says today."""
    code, out, err = run("probe", short, "1")
    assert (code, out) == (2, "")
    assert err.startswith(f"qkvnorm-lens: error: {short}: wanted an option of probe; got")


WITHOUT_TORCH = """
import sys
from qkvnorm_lens.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ["probe", "--sparse", "2"],
        ["probe", "./nowhere"],
        ["probe", "--out", __file__],
        ["probe", "--file", "nowhere.txt"],
        ["report", "nowhere"],
        ["report", os.path.dirname(__file__)],
        ["train", "--out", __file__],
    ],
)
def test_what_can_fail_early_fails_before_torch(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *argv], capture_output=True, text=True
    )
    assert done.returncode in (1, 2), done.stderr
    assert re.fullmatch(r"qkvnorm-lens: error: [^:]+: wanted .*; got .*\n", done.stderr)


def test_a_page_over_a_directory_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.safetensors").write_bytes(b"")
    refused(run("report", str(tmp_path), "--out", str(tmp_path)), "--out: wanted a file's name")
    inside = str(tmp_path / "report.safetensors" / "page.html")
    refused(run("report", str(tmp_path), "--out", inside), "--out: wanted a directory; got the fi")


@pytest.mark.parametrize("argv", [["--help"], ["probe", "--help"], ["models", "--help"]])
def test_help(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert code == 0
    assert out.startswith("usage: ")
    assert err == ""


def test_version_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qkvnorm_lens", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout == f"qkvnorm-lens {qkvnorm_lens.__version__}\n"


def test_without_a_command_the_commands_are_listed(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    for command in ("probe", "report", "models", "train", "experiment"):
        assert re.search(rf"^    {command}\b", err, re.M)
