"""``probe --dataset``, its shards and ``merge``; killed at any point, in one process or several."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from resource import RLIMIT_FSIZE as FILES

import pytest

import hooks
from hooks import CollapseReport
from qkvnorm_lens.models import load_model
from tests.hooks.collapse.test_pooled import assert_equal
from tests.support import models
from tests.support.commands import ALONE, Run, refused

OPTIONS = ["--sigmas", "0.1,0.3", "--context", "32"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some nine hundred documents: groups to be dealt, and blocks enough to be stopped between."""
    path = tmp_path_factory.mktemp("corpus") / "plays.jsonl"
    text = "\n".join(models.shakespeare())
    rows = [{"text": text[at : at + 70]} for at in range(0, len(text) - 70, 12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_corpus_its_shards_and_their_merge(
    run: Run, gpt2_dir: str, corpus: str, tmp_path: Path
) -> None:
    asked = ["probe", gpt2_dir, "--dataset", corpus, "--tokens", "15k", *OPTIONS]
    code, out, err = run(*asked, "--out", str(tmp_path / "one"))
    assert code == 0, err
    assert "windows of at most 32 tokens of plays.jsonl" in out
    for i in (1, 2, 3):
        code, out, err = run(*asked, "--shard", f"{i}/3", "--out", str(tmp_path / "three"))
        assert code == 0, err
        assert f"Shard {i} of 3 is whole" in out
    code, out, err = run("merge", str(tmp_path / "three"))
    assert code == 0, err
    whole, merged = (
        CollapseReport.load(tmp_path / name / "report.safetensors") for name in ("one", "three")
    )
    assert_equal(merged, whole, rtol=1e-12)
    for name in ("report.html", "frame.csv", "summary.txt"):
        assert (tmp_path / "three" / name).exists()
    code, out, _ = run("merge", str(tmp_path / "three"), "--json")
    assert json.loads(out)["read"]["tokens"] == whole.n_tokens >= 15000
    (tmp_path / "three" / "part-00002-of-00003.safetensors").unlink()
    refused(run("merge", str(tmp_path / "three")), "shards of 3", "got none for 2", "--shard 2/3")


def test_a_table_too_small_for_the_heads_is_said(
    run: Run, gpt2_dir: str, corpus: str, tmp_path: Path
) -> None:
    """Sigmas too far apart for it: all else is written, and the command ends well."""
    asked = ["probe", gpt2_dir, "--dataset", corpus, "--tokens", "2k", "--keep", "5", *OPTIONS]
    (tmp_path / "heads.png").write_bytes(b"of another run")
    code, out, err = run(*asked, "--out", str(tmp_path))
    assert code == 0, err
    assert "no map of heads: sigma_at(0.01): wanted bounds within 1.5" in err
    assert "because the table keeps only the 5 nearest competitors" in out
    assert not (tmp_path / "heads.png").exists()
    for name in ("report.html", "collapse.png", "report.safetensors", "summary.txt"):
        assert (tmp_path / name).exists()


def test_heads_of_a_table_too_small_are_ranked_by_the_sigmas_that_are_usual(
    run: Run, gpt2_dir: str, corpus: str, tmp_path: Path
) -> None:
    asked = ["probe", gpt2_dir, "--dataset", corpus, "--tokens", "2k", *OPTIONS[2:], "--json"]
    ranked = []
    for keep in ("5", "131072"):
        code, out, err = run(*asked, "--keep", keep, "--out", str(tmp_path / keep))
        assert code == 0, err
        assert (tmp_path / keep / "heads.png").exists()
        heads = json.loads(out)["heads"]
        ranked.append({head["label"]: head["sigma_at"] for head in heads})
    few, all_ = ranked
    assert few.keys() == all_.keys()
    assert [few[name] for name in all_] == pytest.approx([*all_.values()], rel=0.05)
    saved = CollapseReport.load(tmp_path / "131072" / "report.safetensors")
    code, _, err = run(*asked, "--out", str(tmp_path / "usual"))
    assert code == 0, err
    usual = CollapseReport.load(tmp_path / "usual" / "report.safetensors")
    assert usual.settings.keep == saved.settings.keep == 131072


def test_shards_of_a_sweep_merge(run: Run, gpt2_dir: str, tmp_path: Path) -> None:
    model = load_model(gpt2_dir, device="cpu")
    options = {"sigmas": [0.1], "replicates": 2, "context": 16, "progress": False}
    for i in (1, 2):
        hooks.measure_corpus(
            model, models.shakespeare()[:2], hooks.sweep, shard=(i, 2), out=tmp_path, **options
        )
    code, out, err = run("merge", str(tmp_path))
    assert code == 0, err
    saved = hooks.SweepReport.load(tmp_path / "report.safetensors")
    assert out.startswith(saved.summary())
    assert (tmp_path / "summary.txt").read_text() == saved.summary() + "\n"
    code, out, _ = run("merge", str(tmp_path), "--json")
    assert [row["sigma"] for row in json.loads(out)] == [0.0, 0.1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", "", "--dataset: wanted files with a text; got empty.jsonl, which is empty"),
        ("empty.txt", "", "--dataset: wanted files with a text; got empty.txt, which is empty"),
        (
            "bad.jsonl",
            "no json",
            "--dataset: wanted files of json that can be read; got 'bad.jsonl'",
        ),
        ("x.jsonl", '{"a": 1}\n', "--column: wanted its name, or one column of text; got none in"),
        ("y.jsonl", '{"a": "x", "b": "y"}\n', "one column of text; got several: ['a', 'b']"),
        ("blank.txt", "\n \n", "--dataset: wanted a text of two tokens or more; got none"),
    ],
)
def test_a_corpus_that_can_not_be_read_leaves_nothing(
    run: Run,
    gpt2_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: str,
    said: str,
) -> None:
    (tmp_path / name).write_text(content)
    out, logged = tmp_path / "out", list[logging.LogRecord]()
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", logged.append)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [listener])
    code, printed, err = run(
        "probe", gpt2_dir, "--dataset", str(tmp_path / name), "--out", str(out)
    )
    assert (code, printed) == (1, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not logged  # by the library itself
    assert not out.exists()


def test_options_that_do_not_fit(run: Run, gpt2_dir: str, corpus: str, tmp_path: Path) -> None:
    asked = ["probe", gpt2_dir, "--dataset", corpus]
    refused(run("probe", gpt2_dir, "--tokens", "1k"), "--tokens: wanted it with --dataset")
    refused(run(*asked, "--text", "words"), "--text: wanted it without --dataset")
    refused(run(*asked, "--shard", "1/2"), "--out: wanted a directory for the shard")
    refused(run(*asked, "--column", "x"), "--column: wanted one of ['text']; got 'x'")
    refused(run("merge", str(tmp_path)), "wanted parts of a corpus", f"got none in {tmp_path}")
    for option, value in (("--format", "pdf"), ("--width", "column")):
        refused(run(*asked, option, value), f"{option}: wanted it with --out; got it without")
    for option, value in (("--tokens", "0"), ("--tokens", "1T"), ("--shard", "3/2")):
        code, out, err = run(*asked, option, value)
        assert (code, out) == (2, "")
        assert err.startswith(f"qkvnorm-lens: error: {option}: wanted ")


# -- killed ---------------------------------------------------------------------------------------


def start(
    argv: Sequence[str], launch: str = "", *, room: int | None = None
) -> subprocess.Popen[str]:
    """The command in a process, or several, of its own; a state after each block.

    ``room``: bytes that a file may have, as on a disk that is full then.
    """
    every = "import hooks.corpus.run as p; p.EVERY = 1e-6; import qkvnorm_lens.__main__"
    own = [sys.executable, "-c", every] if not launch else [sys.executable, *launch.split()]
    return subprocess.Popen(
        [*own, *argv],
        env={**ALONE, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if room is None else lambda: resource.setrlimit(FILES, (room, room)),
    )


def killed_and_resumed(argv: list[str], out: Path, rng: random.Random, times: int) -> int:
    """Kill the command at random moments of its run, then let it end; how often it was at work.

    Every fourth time the disk is full instead.
    """
    done, at_work = out / "report.safetensors", 0
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None]
    for number in (numbers * times)[:times]:
        if number is None:
            process = start([*argv, "--out", str(out)], room=rng.randrange(100, 5000))
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1, err
            assert "File too large; not written" in err
            at_work += 1
            continue
        process = start([*argv, "--out", str(out)])
        parts = {p: p.stat().st_mtime_ns for p in out.glob("part-*")} if out.exists() else {}
        while process.poll() is None:  # until it has written a state of its own
            now = {p: p.stat().st_mtime_ns for p in out.glob("part-*.safetensors")}
            if any(parts.get(p) != at for p, at in now.items()):
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        at_work += process.returncode != 0
        if process.returncode not in (0, -signal.SIGKILL):
            assert process.returncode == 128 + number, err
            assert "the same command goes on" in err
    process = start([*argv, "--out", str(out)])
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert done.exists()
    return at_work


def kill_test(gpt2_dir: str, corpus: str, folder: Path, times: int, seed: int) -> int:
    argv = ["probe", gpt2_dir, "--dataset", corpus, *OPTIONS]
    undisturbed = start([*argv, "--out", str(folder / "whole")])
    _, err = undisturbed.communicate(timeout=240)
    assert undisturbed.returncode == 0, err
    n = killed_and_resumed(argv, folder / "killed", random.Random(seed), times)
    whole, killed = (folder / name / "report.safetensors" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    return n


@pytest.mark.slow
def test_kills_and_a_full_disk_leave_no_trace(gpt2_dir: str, corpus: str, tmp_path: Path) -> None:
    assert kill_test(gpt2_dir, corpus, tmp_path, 4, 0) >= 2


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_twenty_kills_leave_no_trace(gpt2_dir: str, corpus: str, tmp_path: Path, seed: int) -> None:
    assert kill_test(gpt2_dir, corpus, tmp_path, 4, seed) >= 2


@pytest.mark.slow
def test_two_ranks_are_one_process(run: Run, gpt2_dir: str, corpus: str, tmp_path: Path) -> None:
    asked = ["probe", gpt2_dir, "--dataset", corpus, "--tokens", "15k", *OPTIONS]
    code, _, err = run(*asked, "--out", str(tmp_path / "one"))
    assert code == 0, err
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m qkvnorm_lens"
    both = start([*asked, "--out", str(tmp_path / "two")], launch)
    out, err = both.communicate(timeout=240)
    assert both.returncode == 0, err
    assert out.count("windows of at most 32 tokens") == 1
    one, two = (
        CollapseReport.load(tmp_path / name / "report.safetensors") for name in ("one", "two")
    )
    assert_equal(two, one, rtol=1e-12)
    assert_equal(hooks.merge_corpus(tmp_path / "two"), two)


@pytest.mark.slow
def test_a_lost_ranks_shard_is_run_alone(
    run: Run, gpt2_dir: str, corpus: str, tmp_path: Path
) -> None:
    """One of two ranks is killed at work: the launcher names it, and nothing is counted twice."""
    asked = ["probe", gpt2_dir, "--dataset", corpus, *OPTIONS, "--out", str(tmp_path / "two")]
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 -m qkvnorm_lens"
    both = start(asked, launch)
    while not (tmp_path / "two" / "part-00002-of-00002.lock").exists():
        assert both.poll() is None
        time.sleep(0.01)
    for entry in Path("/proc").iterdir():
        try:
            lines = (entry / "environ").read_bytes().split(b"\0")
            mine = (entry / "status").read_text().partition("PPid:")[2].split()[0] == str(both.pid)
        except (OSError, IndexError):  # gone, or no process
            continue
        if mine and b"RANK=1" in lines:
            os.kill(int(entry.name), signal.SIGKILL)
    _, err = both.communicate(timeout=240)
    assert both.returncode != 0
    assert "rank      : 1 " in err
    refused(run("merge", str(tmp_path / "two")), "wanted")
    for i in (1, 2):
        code, _, err = run(*asked, "--shard", f"{i}/2")
        assert code == 0, err
    code, _, err = run("merge", str(tmp_path / "two"))
    assert code == 0, err
    code, _, err = run(*asked[:-1], str(tmp_path / "one"))
    assert code == 0, err
    one, two = (
        CollapseReport.load(tmp_path / name / "report.safetensors") for name in ("one", "two")
    )
    assert_equal(two, one, rtol=1e-12)
