"""``qkvnorm-lens probe`` on a language model: which text it reads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2LMHeadModel

import hooks
from qkvnorm_lens import text
from qkvnorm_lens.models import loading
from tests.support import models
from tests.support.commands import ALONE, PROSE, QUICK, Run, characters, refused


def test_long_text_is_cut_and_the_rest_is_named(run: Run, gpt2_dir: str) -> None:
    argv = ["probe", gpt2_dir, *QUICK, "--text", 3 * PROSE, "--length", "33", "--prompts", "3"]
    code, out, err = run(*argv, "--json")
    assert code == 0
    left_out = f"{len(3 * PROSE) - 3 * 32} of {len(3 * PROSE)} tokens of the text left out"
    assert err.startswith(f"qkvnorm-lens: {left_out}")
    assert len(err.splitlines()) == 1
    read = json.loads(out)["read"]
    assert read["tokens"] == 3 * 33  # with bos
    assert read["left_out"].startswith(left_out)


def test_windows_hold_the_whole_text_behind_bos(gpt2_dir: str) -> None:
    model = loading.load_model(gpt2_dir)
    given = 2 * PROSE
    cut = text.windows(model, given, length=20, limit=100)
    assert all(window[0] == model.tokenizer.bos_token_id for window in cut.ids)
    assert max(map(len, cut.ids)) == 20
    joined = [token for window in cut.ids for token in window[1:]]
    assert joined == model.to_tokens(given, prepend_bos=False, truncate=False)[0].tolist()
    assert cut.left_out == ""
    assert text.windows(model, given).ids[0] == model.to_tokens(given)[0].tolist()[: models.N_CTX]


@pytest.mark.parametrize(
    ("given", "options", "n_bos"),
    [
        ("a cat", [], 1),
        ("a cat", ["--prepend-bos"], 1),
        ("a cat", ["--no-prepend-bos"], 0),
        ("<bos>a cat", [], 1),
        ("<bos>a cat", ["--prepend-bos"], 2),
        ("<bos>a cat", ["--no-prepend-bos"], 1),
    ],
)
def test_a_text_begins_as_asked(
    run: Run, gpt2_dir: str, seen: dict[str, Any], given: str, options: list[str], n_bos: int
) -> None:
    refused(run("probe", gpt2_dir, "--text", given, *options), "enough")
    bos, (ids,) = 0, seen["tokens"]
    assert ids[:n_bos] == [bos] * n_bos
    assert bos not in ids[n_bos:]
    assert len(ids) == n_bos + len("a cat")


def test_messages_are_written_by_the_template(
    run: Run, gpt2_dir: str, tmp_path: Path, seen: dict[str, Any]
) -> None:
    tokenizer = characters()
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    models.tiny_hf(GPT2LMHeadModel, models.tiny_gpt2_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chats = [[{"role": "user", "content": said}] for said in ("a cat", "sat")]
    wanted = [tokenizer(f"<bos>{said}.")["input_ids"] for said in ("a cat", "sat")]
    for given, ids in ((chats, wanted), (chats[0], wanted[:1])):
        file = tmp_path / "chat.json"
        file.write_text(json.dumps(given), encoding="utf-8")
        argv = ["probe", str(tmp_path), "--messages", str(file)]
        refused(run(*argv), "enough")
        assert seen["tokens"] == ids
    refused(run(*argv, "--length", "9"), "--length: wanted none beside --messages; got 9")
    refused(run(*argv, "--prepend-bos"), "--prepend-bos: wanted none beside --messages; got True")
    file.write_text('[{"content": "a cat"}]', encoding="utf-8")
    refused(run(*argv), "messages: wanted a list of messages with role and content")
    file.write_text("a cat", encoding="utf-8")
    refused(run(*argv), "--messages: wanted a file of JSON")
    file.write_text(json.dumps(chats), encoding="utf-8")
    refused(run("probe", gpt2_dir, "--messages", str(file)), "template")
    refused(run("probe", "--messages", str(file)), "--messages: wanted a model of language")


def test_a_file_and_standard_input_and_text_are_the_same(
    run: Run,
    gpt2_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: dict[str, Any],
) -> None:
    (tmp_path / "story.txt").write_text(PROSE, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROSE))
    read = []
    for given in (["--text", PROSE], ["--file", str(tmp_path / "story.txt")], ["--file", "-"]):
        refused(run("probe", gpt2_dir, *given), "enough")
        read.append(seen["tokens"])
    assert read[0] == read[1] == read[2]
    assert sum(map(len, read[0])) == len(PROSE) + 2  # a window for 63 characters, with bos


def test_the_built_in_passage_is_long_enough_and_named(run: Run, gpt2_dir: str) -> None:
    code, out, err = run("probe", gpt2_dir, *QUICK, "--prompts", "2", "--no-sinks")
    assert code == 0
    assert "of the built-in passage (Pride and Prejudice, chapter 1)" in out
    assert "sinks left out" in out.split("Most fragile rows")[1].splitlines()[0]
    assert " sink " not in out.split("Most fragile rows")[1]
    assert len(text.passage().split()) > 800
    assert "left out" in err


@pytest.mark.slow
def test_third_parties_are_quiet(gpt2_dir: str) -> None:
    """Nothing but what we say, on either stream of a real process."""
    argv = ["probe", gpt2_dir, *QUICK, "--text", PROSE, "--length", "30", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "qkvnorm_lens", *argv], capture_output=True, text=True, env=ALONE
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["sparse"] > 0
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.real_model
def test_probe_gpt2_end_to_end_offline(gpt2_hub_cache: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("qkvnorm-lens")
    argv = ["probe", "gpt2", "--json", "--out", str(tmp_path), "--length", "64", "--prompts", "2"]
    done = subprocess.run(
        [command, *argv, *QUICK],
        capture_output=True,
        text=True,
        env={**ALONE, "HF_HUB_CACHE": str(gpt2_hub_cache), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1  # what was left out
    told = json.loads(done.stdout)
    report = hooks.CollapseReport.load(tmp_path / "report.safetensors")
    assert report.n_sparse > 1000
    assert told["model"]["name"] == "gpt2"
    assert told["rates"][-1]["loose"] == report.to_frame("model")["loose"].iloc[-1] > 0
    assert report.tokens[0][:4] == ("<|endoftext|>", "It", " is", " a")
