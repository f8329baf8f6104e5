"""Errors of commands are one line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hooks
from qkvnorm_lens.cli import main
from tests.support.commands import PROSE, SUMS, Run, refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["./nowhere"], ["'./nowhere'", "addition-pre"]),
        (["a/b/c"], ["'a/b/c'"]),
        ([__file__], ["a file"]),
        ([os.path.dirname(__file__)], ["config.json"]),
        (["--sigmas", "0.9"], ["sigma", "0.9"]),
        (["--sigmas", "0.25", "--law", "gaussian"], ["0.2"]),
        (["--layers", "9"], ["9"]),
        (["--draws", "1", "--method", "sample"], ["--draws: wanted 2 or more"]),
        (["--device", "nonsense"], ["--device: ", "'nonsense'"]),
        (["--device", "cuda:77"], ["--device: ", "'cuda:77'"]),
        (["--split", "huge"], ["'huge'", "small-train"]),
        (["--length", "5"], ["--length"]),
        (["--text", ""], ["text"]),
        (["--text", "[1+2=\nwhat"], ["line 2"]),
        (["--text", "[1+2=*"], ["line 1"]),
        (["--text", "1+2="], ["line 1"]),
        (["--text", "[" + 40 * "1"], ["line 1", "32"]),
        (["--text", "["], ["2 tokens"]),
        (["--text", __file__], ["--file"]),
        (["--file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--file", sys.executable], ["UTF-8"]),
        (["--out", __file__], ["--out: wanted a directory; got the file"]),
        (["--out", __file__ + "/below"], ["--out: wanted a directory; got the file"]),
        (["--file", os.path.dirname(__file__)], ["--file: wanted a file of UTF-8 text"]),
        (["addition-per"], ["MODEL: wanted ", "(did you mean 'addition-pre'?)"]),
        (["--split", "smal-train"], ["--split: wanted ", "(did you mean 'small-train'?)"]),
        (["--sigmas", "0.2,0.1"], ["--sigmas: wanted ascending"]),
    ],
)
def test_expected_errors_are_one_line(run: Run, argv: list[str], words: list[str]) -> None:
    refused(run("probe", *argv), *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--text", "  \n"], ["text", "empty"]),
        (["--length", "65"], ["64"]),
        (["--split", "small-train"], ["addition model"]),
    ],
)
def test_expected_errors_of_language_models(
    run: Run, gpt2_dir: str, argv: list[str], words: list[str]
) -> None:
    refused(run("probe", gpt2_dir, *argv), *words)


def test_an_unsupported_family_is_refused_by_name(run: Run, mamba_dir: str) -> None:
    refused(run("probe", mamba_dir, "--text", PROSE), "attention", "no attention layer")


@pytest.mark.parametrize("name", ["some/model", "unheard-of", "bert-base-uncased"])
def test_an_id_that_is_not_cached_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    answer = run("probe", name)
    refused(answer, f"'{name}'", "path/to/model", "save_pretrained", "addition-pre")


def test_a_directory_that_lacks_weights_or_tokenizer(
    run: Run, gpt2_dir: str, tmp_path: Path
) -> None:
    config = (Path(gpt2_dir) / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    refused(run("probe", str(tmp_path)), "model.safetensors")
    weights = (Path(gpt2_dir) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    refused(run("probe", str(tmp_path)), "tokenizer")
    (tmp_path / "config.json").write_text("{")
    refused(run("probe", str(tmp_path)), "config.json", "JSON")


def test_an_error_can_be_traced(run: Run) -> None:
    with pytest.raises(ValueError, match="sigma"):
        run("probe", "--sigmas", "0.9", "--traceback")


def test_interrupted_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hooks, "collapse_probe", interrupted)
    assert run(*SUMS) == (130, "", "qkvnorm-lens: interrupted\n")


def test_too_little_memory_says_what_helps(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hooks, "collapse_probe", full)
    refused(run(*SUMS), "out of memory", "--batch-size")


def test_a_terminal_without_the_characters_still_gets_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert main(SUMS) == 0
    assert b"\\xb1" in plain.buffer.getvalue()  # the plus-minus sign


def test_a_reader_that_stops_is_no_error() -> None:
    argv = [sys.executable, "-m", "qkvnorm_lens", "models", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
