"""One shard of a corpus on disk: a report of what was counted so far, and what it was counted of.

The file is a pooled report like any other; its fact ``corpus`` says what was read (`what`), which
shard this is, and how far it came (`done`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from filelock import FileLock, Timeout

from hooks.collapse import CollapseReport
from hooks.measures.interference import InterferenceReport
from hooks.measures.spread import SpreadReport
from hooks.measures.sweep import SweepReport
from hooks.reports import load_report, one_model, save_report

DONE: Final = (
    "groups",
    "blocks",
    "windows",
    "prompts",
    "tokens",
    "documents",
    "digest",
    "complete",
)
SHARED: Final = ("groups", "documents", "empty", "seen", "digest")
"""What all shards have read of a corpus, so that it is the same for each."""
_KINDS: Final = (CollapseReport, SweepReport, SpreadReport, InterferenceReport)
_LEFT_OUT: Final = (("empty", "empty documents"), ("single", "windows of one token"))


class Part:
    """The file of a shard, and the lock that keeps a second process from it."""

    def __init__(self, folder: Path, shard: tuple[int, int]) -> None:
        self.shard = shard
        self.path = folder / f"part-{shard[0]:05}-of-{shard[1]:05}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, the shard is this process's own.

        Raises:
            ValueError: another process has it, or a file stands where the directory should.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"out: wanted a directory; got a file, {folder}") from None
        lock = FileLock(self.path.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"out: wanted a directory that no other process writes shard {self.shard[0]} of "
                f"{self.shard[1]} to; got {self.path.parent}, where one is at work"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def save(self, report: Any) -> None:
        """Write the file whole, or leave the one of before.

        Raises:
            OSError: it can't be written (a full disk).
        """
        save_report(report, self.path, draft=self.path.with_suffix(".draft"))

    def load(self, fresh: Any) -> Any:
        """What an earlier process counted of the same corpus and model; None where none did.

        Raises:
            ValueError: it counted something else: the message says what differs.
        """
        if not self.path.exists():
            return None
        report = read_part(self.path)
        wanted = f"out: wanted another directory, or the run that {self.path} is a part of"
        mine, theirs = fresh.model["corpus"]["what"], corpus_of(report, self.path)["what"]
        if mine["measure"] == theirs["measure"]:
            settings = fresh.settings or report.settings  # else they follow from the options
            try:
                one_model(report, SimpleNamespace(settings=settings, model=fresh.model))
            except ValueError as error:
                raise ValueError(f"{wanted}; got another: {error}") from error
        for name, (a, b) in differing(mine, theirs):
            raise ValueError(f"{wanted}; got {name} {a!r} instead of {b!r}")
        return report


def read_part(path: Path) -> Any:
    """The report of a shard, whatever was measured."""
    return load_report(path, _KINDS)


def corpus_of(report: Any, path: Path) -> Any:
    """What the report of a shard says of its corpus.

    Raises:
        ValueError: it is not that of a shard.
    """
    fact: Any = report.model.get("corpus")
    whole = isinstance(fact, dict) and all(isinstance(fact.get(n), dict) for n in ("what", "done"))
    if whole and "groups" not in fact["done"]:
        raise ValueError(
            f"{path}: wanted a part whose documents were dealt; got one of an earlier version, "
            "which dealt windows: that version goes on with it, or count it anew in another "
            "directory"
        )
    if not whole or not report.settings.pooled or {*DONE} - {*fact["done"]}:
        raise ValueError(f"{path}: wanted a part of a corpus; got another report")
    return fact


def left_out(done: Mapping[str, Any]) -> list[str]:
    """What was left out of a corpus, in words."""
    return [f"{done[name]} {what} left out" for name, what in _LEFT_OUT if done.get(name)]


def differing(
    mine: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Names under which two mappings differ, what is measured before the rest; what each has."""
    for name in sorted({*mine, *other}, key=lambda name: (name != "measure", name)):
        if mine.get(name) != other.get(name):
            yield name, (mine.get(name), other.get(name))
