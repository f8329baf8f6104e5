"""Documents of a data set, one after the other, read with Hugging Face `datasets`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from hooks.arguments import brief, check_path, check_text

_KINDS: Final = {
    "json": (".jsonl", ".json", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md"),
}
_PACKED: Final = (".gz", ".bz2", ".xz", ".zst")
_PIECE: Final = 1 << 16  # characters of a text file that are one document


class Documents:
    """The texts of a data set, in its order; each iteration reads it from the beginning.

    Args:
        dataset: a file or folder of JSON lines, parquet, CSV or text, also compressed; an id of the
            Hugging Face Hub; a `datasets.Dataset`; or a list of texts or rows.
        split: of a data set of the hub; default: its only one.
        column: the column with the text; default: ``"text"``, or the only column of text.

    Raises:
        ValueError: nothing that can be read: the message says what is there.
        ImportError: without `datasets`.
    """

    def __init__(self, dataset: Any, split: str | None, column: str | None) -> None:
        self.split = None if split is None else check_text("split", split)
        self.column = None if column is None else check_text("column", column)
        self.files: list[Path] = []
        meant = isinstance(dataset, str) and (dataset.endswith("/") or dataset.startswith("."))
        if isinstance(dataset, (str, os.PathLike)):
            dataset = str(check_path("dataset", dataset))
        elif not _again_and_again(dataset):
            raise TypeError(
                "dataset: wanted a file, a folder, an id of the Hugging Face Hub, a data set, or a "
                f"list of texts or rows; got {brief(dataset)}"
            )
        self.dataset: Any = dataset
        if isinstance(dataset, str):
            path = Path(dataset)
            local = meant or path.exists() or path.is_absolute() or bool(_kind_of(path))
            self.name = path.name if local else dataset
            self.kind = self._find(path) if local else ""
        else:
            self.name, self.kind = "rows given", "rows"
        if split is not None and self.kind and not isinstance(dataset, Mapping):
            raise ValueError(f"split: wanted none beside files or rows; got {brief(split)}")

    def __iter__(self) -> Iterator[str]:
        """Raises ValueError for a row without text, by its number."""
        if self.kind == "text":
            for file in self.files:
                yield from self._pieces(file)
            return
        column = self.column
        for number, row in enumerate(self._rows()):
            if isinstance(row, str):
                yield row
                continue
            if not isinstance(row, Mapping):
                raise TypeError(f"dataset: wanted texts or rows with names; got {brief(row)}")
            column = _column(row, column)
            text = row[column]
            if not isinstance(text, str):
                raise ValueError(
                    f"column: wanted text in column {column!r}; got {brief(text)} in row {number}"
                )
            yield text

    def _find(self, path: Path) -> str:
        """The kind of the files, which are all of one."""
        if not path.exists():
            raise ValueError(f"dataset: wanted a file or folder that is there; got {str(path)!r}")
        whole = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        kinds = {file: _kind_of(file) for file in whole if not file.name.startswith(".")}
        known = sorted({kind for kind in kinds.values() if kind})
        if len(known) != 1 or (path.is_file() and not known):
            got = " and ".join(known) or (path.suffix if path.is_file() else "") or "no such file"
            wanted = ", ".join(end for ends in _KINDS.values() for end in ends)
            mixed = " together" if len(known) > 1 else ""
            raise ValueError(
                f"dataset: wanted files all of one kind, of {wanted} (also {', '.join(_PACKED)}); "
                f"got {got}{mixed} in {path.name}"
            )
        self.files = [file for file, kind in kinds.items() if kind]
        if not any(file.stat().st_size for file in self.files):
            raise ValueError(f"dataset: wanted files with a text; got {path.name}, which is empty")
        return known[0]

    def _rows(self) -> Iterable[Any]:
        if self.kind == "rows":
            given = self.dataset
            rows: Iterable[Any] = self._only(given) if isinstance(given, Mapping) else given
            return rows
        if self.kind == "":
            return self._of_the_hub()
        files = [str(file) for file in self.files]
        options = {"delimiter": "\t"} if ".tsv" in self.files[0].name else {}
        read: Iterable[Any] = self._load(self.kind, data_files=files, split="train", **options)
        return read

    def _of_the_hub(self) -> Iterable[Any]:
        found = self._load(str(self.dataset), split=self.split)
        read: Iterable[Any] = self._only(found) if isinstance(found, Mapping) else found
        return read

    def _only(self, splits: Mapping[Any, Any]) -> Iterable[Any]:
        """The split that was asked for, or the only one."""
        name = self.split if self.split is not None or len(splits) != 1 else next(iter(splits))
        if name not in splits:
            raise ValueError(f"split: wanted one of {sorted(map(str, splits))}; got {brief(name)}")
        rows: Iterable[Any] = splits[name]
        if not isinstance(rows, Iterable):
            raise TypeError(f"dataset: wanted rows in split {name!r}; got {brief(rows)}")
        return rows

    def _pieces(self, file: Path) -> Iterator[str]:
        """Paragraphs of a text file, some 64 thousand characters together."""
        piece: list[str] = []
        size = 0
        for row in self._load("text", data_files=[str(file)], split="train", sample_by="paragraph"):
            piece.append(row["text"])
            size += len(row["text"])
            if size >= _PIECE:
                yield "\n\n".join(piece)
                piece, size = [], 0
        if piece:
            yield "\n\n".join(piece)

    def _load(self, what: str, **options: Any) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                "dataset: wanted the package datasets, which reads it (pip install "
                f"'qkvnorm-lens[corpus]'); got {error}"
            ) from error
        try:
            with _no_words():
                loaded = datasets.load_dataset(what, streaming=True, **options)
        except Exception as error:  # of the network, the hub, the file system, each with its own
            raise self._unreadable(error) from error
        if isinstance(loaded, dict):
            return {name: self._watched(rows) for name, rows in loaded.items()}
        return self._watched(loaded)

    def _watched(self, rows: Iterable[Any]) -> Iterator[Any]:
        each = iter(rows)
        while True:
            try:
                with _no_words():
                    row = next(each)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            yield row

    def _unreadable(self, error: Exception) -> ValueError:
        said = " ".join(str(error.__cause__ or error).split())[:200] or "no rows in it"
        kind = f"files of {self.kind}" if self.kind else "a data set of the Hugging Face Hub"
        here = "" if self.kind or "/" in self.name else ", which is no file or folder here"
        return ValueError(
            f"dataset: wanted {kind} that can be read; got {self.name!r}{here}: {said}"
        )


@contextmanager
def _no_words() -> Iterator[None]:
    """Inside, `datasets` logs nothing: what it would say is in the error."""
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _again_and_again(rows: Any) -> bool:
    """Whether this can be read more than once."""
    if isinstance(rows, (bytes, Iterator)):
        return False
    try:
        iter(rows)
    except Exception:  # a class, a scalar array, something of somebody's own
        return False
    return True


def _kind_of(file: Path) -> str:
    name = file.name.lower()
    for end in _PACKED:
        name = name.removesuffix(end)
    return next((kind for kind, ends in _KINDS.items() if name.endswith(ends)), "")


def _column(row: Mapping[str, Any], column: str | None) -> str:
    """The column of text."""
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if column is None and ("text" in row or len(texts) == 1):
        return "text" if "text" in row else texts[0]
    if column is None:
        got = f"several: {texts}" if texts else f"none in {sorted(row)}"
        raise ValueError(f"column: wanted its name, or one column of text; got {got}")
    if column not in row:
        raise ValueError(f"column: wanted one of {sorted(row)}; got {brief(column)}")
    return column
