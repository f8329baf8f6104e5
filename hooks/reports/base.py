"""What reports share: one file on disk, and which reports can be merged.

A report's class says what its file holds: settings, facts and texts in the header, as JSON, and an
array for each field with a shape. `Form` adds what the annotations do not say. A file is read in
this order: its header against its size; settings and texts against their types and ranges; names,
dtypes and shapes of arrays against the settings; then the arrays, their digest, and their numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from safetensors.numpy import save

from hooks.arguments import check_path
from hooks.errors import ReportFileError
from hooks.reports.figures import figure_of
from hooks.reports.files import (
    DIGEST,
    TensorFile,
    Unsound,
    digest_of,
    entries_of,
    read_json,
    start_digest,
    with_words,
    write_whole,
)
from hooks.reports.notebook import Curves, card
from hooks.reports.values import as_kind, check_facts, check_texts

_UNLIKE = ("device", "engine", "given", "corpus", "numbers")  # facts that two parts may differ in
_DTYPES: Final = {"Int": "I64", "Float": "F64", "Bool": "BOOL"}
R = TypeVar("R")
Sizes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Form(Generic[R]):
    """A kind of report as a file.

    Args:
        report: the class.
        name: its name in messages and in the file.
        version: of the files that are written; files of the version before have no digest and are
            read too.
        settings: refuses settings that no call would accept.
        sizes: from settings, facts and the number of prompts: the length of each axis that they
            decide, by its name in the annotations. For a field that is a tuple of arrays, by the
            field's name: the axes of each array, lengths or names.
        numbers: refuses arrays whose numbers do not fit together.
        facts: the model's facts that the report reads, with their types.
        dtypes: those of fields that are not int64, float64 or bool.
        what: its name in messages; default: ``name``.
    """

    report: type[R]
    name: str
    version: int
    settings: Callable[[Any], None]
    sizes: Callable[[Any, Mapping[str, Any], int], Sizes]
    numbers: Callable[[Any], None]
    facts: Mapping[str, Any]
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    what: str = ""

    def __post_init__(self) -> None:
        _FORMS[self.report] = self

    def save(self, report: R, path: str | Path, *, draft: Path | None = None) -> Path:
        """See :meth:`SavedReport.save`; ``draft`` as in :func:`write_whole`."""
        path = check_path("path", path)
        if path.is_dir():
            raise IsADirectoryError(f"path: wanted a file's name; got the directory {path}")
        kinds = _kinds(self.report)
        head = {n: getattr(report, n) for n, kind in kinds.items() if not _has_arrays(kind)}
        words = {"format": self._format(self.version)}
        words |= {name: json.dumps(_plain(value)) for name, value in head.items()}
        # ascontiguousarray gives a number an axis; take it away again.
        arrays = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in _arrays_of(report)}
        words[DIGEST] = digest_of(words, entries_of(arrays), arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(path, with_words(save(arrays), words), draft=draft)

    def load(self, path: str | Path) -> R:
        """See :meth:`SavedReport.load`."""
        path = check_path("path", path)
        if not path.is_file():
            kind = IsADirectoryError if path.is_dir() else FileNotFoundError
            raise kind(f"path: wanted a {self.name}; got {path}, which is no file")
        try:
            with path.open("rb") as stream:
                return self._read(TensorFile.open(stream))
        except Unsound as error:
            wanted = error.wanted
            if error.field in ("header", "__metadata__"):
                wanted = f"a {self.what or self.name}, with {wanted}"
            raise ReportFileError(path, error.field, wanted=wanted, got=error.got) from error

    def _format(self, version: int) -> str:
        return f"qkvnorm-lens {self.name} {version}"

    def _read(self, file: TensorFile) -> R:
        form = file.words.get("format")
        digested = form == self._format(self.version)
        if not digested and form != self._format(self.version - 1):
            wanted = f"the format {self._format(self.version)!r}"
            raise Unsound("format", wanted=wanted, got=f"{form!r:.80}")
        kinds = _kinds(self.report)
        headed = {n: kind for n, kind in kinds.items() if not _has_arrays(kind)}
        also = {"format", DIGEST} if digested else {"format"}
        if not digested:  # written before there was such a field
            fields: Any = dataclasses.fields(self.report)  # type: ignore[arg-type]
            later = {f.name for f in fields if f.default == ()}
            headed = {n: k for n, k in headed.items() if n not in later - {*file.words}}
        same_names("header", {*headed, *also}, file.words)
        try:
            head = {n: as_kind(k, read_json(file.words[n], n), n) for n, k in headed.items()}
            self.settings(head["settings"])
        except Unsound:
            raise
        except (ValueError, TypeError, OverflowError) as error:  # what a call would have said
            raise Unsound("settings", wanted="those of a call", got=str(error)) from error
        check_facts(head["model"], {"name": str, "fingerprint": str, **self.facts})
        check_texts(head)
        sizes = self.sizes(head["settings"], head["model"], len(head["tokens"]))
        absent = {
            n
            for n in _absent(self.report, file.entries)
            if _is_empty(kinds[n], sizes) or not (digested or hasattr(kinds[n], "dim_str"))
        }
        _check_layout(_specs(kinds, sizes, self.dtypes, absent), sizes, file)
        hashed = start_digest(file.words, file.entries)
        arrays = {n: file.array(n, hashed.update) for n in sorted(file.entries)}
        if digested:
            file.check_digest(f"sha256:{hashed.hexdigest()}")
        report = self.report(**head, **_grouped(kinds, arrays, sizes, absent))
        self.numbers(report)
        return report


_FORMS: dict[type, Form[Any]] = {}


def save_report(report: Any, path: Path, *, draft: Path) -> Path:
    """Write a report of any kind; ``draft`` as in :func:`write_whole`."""
    return _FORMS[type(report)].save(report, path, draft=draft)


def load_report(path: Path, kinds: Sequence[type]) -> Any:
    """The report in a file, of one of these kinds: the first, where the file doesn't say which.

    Raises:
        ReportFileError: the file is not a report of that kind, or not whole.
        OSError: no such file, or one that can't be read.
    """
    said = ""
    try:
        with path.open("rb") as stream:
            said = TensorFile.open(stream).words.get("format", "")
    except (Unsound, OSError):  # which loading names
        pass
    named = (kind for kind in kinds if said.startswith(f"qkvnorm-lens {_FORMS[kind].name} "))
    return _FORMS[next(named, kinds[0])].load(path)


class SavedReport:
    """What every report can do: be printed, saved and loaded."""

    def summary(self) -> str:
        """A few sentences: what was measured, what the result is, and what it leaves open."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return self.summary()

    def glance(self) -> tuple[pd.DataFrame, Curves]:
        """What a notebook shows below the words: a small sorted table, and curves over sigma."""
        raise NotImplementedError

    def plot(self, **options: Any) -> Any:
        """The report's own figure; a notebook shows it at the end of a cell.

        Args:
            options: those of the function that draws it (:mod:`qkvnorm_lens.plots`), such as ``ax``
                or ``backend="plotly"``: ``collapse_curve`` for a :class:`hooks.CollapseReport`,
                ``accuracy_curve`` (sweep), ``spread_bands``, ``interference_by_depth``,
                ``rank_by_depth``, ``spectrum_by_depth``, ``symmetry_by_depth``.

        Returns:
            A figure of matplotlib (``figure.savefig(path)``) or of plotly.

        Raises:
            ImportError: no package that draws it is installed, or not what that package needs.
        """
        return figure_of(self, options)

    def _repr_html_(self) -> str:
        return card(self.summary(), *self.glance())

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with the settings as JSON in its header; returns its path.

        Raises:
            OSError: it can't be written (a directory, a full disk); the message says what was kept.
        """
        return _FORMS[type(self)].save(self, path)

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Read what ``save`` wrote.

        Raises:
            ReportFileError: the file is not a report of this kind, or not whole.
            OSError: no such file, or one that can't be read.
        """
        form: Form[R] = _FORMS[cls]
        return form.load(path)


class CorpusReport(SavedReport):
    """A report of prompts that can be measured part by part."""

    def merge(self: R, later: R) -> R:
        """The report of both corpora, as if they had been measured in one run.

        Args:
            later: a report of the same model and settings whose first prompt follows this one's
                last: measured with ``first_prompt=len(report.tokens)``.

        Raises:
            TypeError: another kind of report.
            ValueError: other settings, another model, or prompts that do not follow.
        """
        check_follows(self, later)
        joined = dict(_joined(self, later))
        beside = getattr(self, "_beside", None)
        return dataclasses.replace(self, **joined | (beside(later) if beside else {}))  # type: ignore[type-var]


def _joined(first: Any, later: Any) -> Iterator[tuple[str, Any]]:
    """Fields of both: arrays by prompt concatenated, others added."""
    yield "model", joined_facts(first, later)
    pooled = getattr(first.settings, "pooled", False)  # an axis of prompts has one entry
    for name, kind in _kinds(type(first)).items():
        mine, other = getattr(first, name), getattr(later, name)
        if hasattr(kind, "dim_str"):
            axes = kind.dim_str.split()
            at = axes.index("prompt") if "prompt" in axes and not pooled else None
            yield name, mine + other if at is None else np.concatenate([mine, other], axis=at)
        elif name in ("tokens", "decoder_tokens"):
            yield name, mine + other


# -- what a class says of its file ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Spec:
    """An array that a file must have.

    Attributes:
        axes: their names, or lengths.
        group: arrays of one group share the lengths that nothing else decides.
    """

    name: str
    axes: tuple[str, ...]
    dtype: str
    group: str


def _kinds(report: type) -> dict[str, Any]:
    return get_type_hints(report)


def _has_arrays(kind: Any) -> bool:
    """Whether this is an array, a tuple of arrays, or a class of only arrays."""
    if get_origin(kind) is tuple:
        return _has_arrays(get_args(kind)[0])
    if dataclasses.is_dataclass(kind):
        return all(map(_has_arrays, get_type_hints(kind).values()))
    return hasattr(kind, "dim_str")


def _arrays_of(report: Any) -> Iterable[tuple[str, np.ndarray]]:
    optional = {n for n in _absent(type(report), {}) if hasattr(_kinds(type(report))[n], "dim_str")}
    for name, kind in _kinds(type(report)).items():
        value = getattr(report, name)
        if not _has_arrays(kind) or (name in optional and not np.size(value)):
            continue
        if get_origin(kind) is tuple:
            yield from ((f"{name}.{i}", array) for i, array in enumerate(value))
        elif dataclasses.is_dataclass(kind):
            for part in dataclasses.fields(kind):
                yield f"{name}.{part.name}", getattr(value, part.name)
        else:
            yield name, value


def _absent(report: Any, entries: Mapping[str, Any]) -> set[str]:
    """Fields with a default that are wholly missing from files older than the fields."""
    return {
        f.name
        for f in dataclasses.fields(report)
        if f.default_factory is not dataclasses.MISSING
        and not any(name.startswith(f"{f.name}.") or name == f.name for name in entries)
    }


def _is_empty(kind: Any, sizes: Sizes) -> bool:
    """Whether the settings leave an array no entry."""
    return hasattr(kind, "dim_str") and any(sizes.get(axis) == 0 for axis in kind.dim_str.split())


def _specs(
    kinds: Mapping[str, Any], sizes: Sizes, dtypes: Mapping[str, str], absent: set[str]
) -> dict[str, _Spec]:
    out: dict[str, _Spec] = {}

    def add(name: str, kind: Any, field: str, group: str, axes: Iterable[Any] = ()) -> None:
        dtype = dtypes.get(field) or next(d for n, d in _DTYPES.items() if n in kind.__name__)
        own = tuple(map(str, axes)) or tuple(kind.dim_str.split())
        out[name] = _Spec(name, own, dtype, group)

    for name, kind in kinds.items():
        if not _has_arrays(kind) or name in absent:
            continue
        if get_origin(kind) is tuple:
            for i, axes in enumerate(sizes[name]):
                add(f"{name}.{i}", get_args(kind)[0], name, f".{i}", axes)
        elif dataclasses.is_dataclass(kind):
            for part, inner in get_type_hints(kind).items():
                add(f"{name}.{part}", inner, f"{name}.{part}", name)
        else:
            add(name, kind, name, "")
    return out


def same_names(what: str, wanted: Iterable[str], got: Iterable[str]) -> None:
    """Refuse other names than these."""
    missing, more = sorted({*wanted} - {*got}), sorted({*got} - {*wanted})
    if missing or more:
        said = [f"no {name}" for name in missing] + [f"{name!r:.80}" for name in more]
        first = missing[0] if missing else "none but these"
        raise Unsound(what, wanted=first, got=", ".join(said[:4]))


def _check_layout(specs: Mapping[str, _Spec], sizes: Sizes, file: TensorFile) -> None:
    """Names, dtypes and shapes, before an array is read."""
    same_names("arrays", specs, file.entries)
    known: dict[tuple[str, str], int] = {}  # lengths that the first array with them decides
    for name, spec in specs.items():
        entry = file.entries[name]
        if entry.dtype != spec.dtype:
            raise Unsound(name, wanted=f"dtype {spec.dtype}", got=entry.dtype)
        wanted: list[Any] = []
        for axis, length in zip(spec.axes, entry.shape, strict=False):
            size = int(axis) if axis.isdigit() else sizes.get(axis)
            if size is None:
                size = known.setdefault((spec.group, axis), length)
            wanted.append(length if size is None else size)
        if len(entry.shape) != len(spec.axes) or list(entry.shape) != wanted:
            raise Unsound(
                name,
                wanted=f"[{', '.join(spec.axes)}]" + (f" = {wanted}" if wanted else ""),
                got=f"{list(entry.shape)}",
            )


def _grouped(
    kinds: Mapping[str, Any], arrays: Mapping[str, np.ndarray], sizes: Sizes, absent: set[str]
) -> dict[str, Any]:
    """Arrays as the fields of a report."""
    out: dict[str, Any] = {}
    for name, kind in kinds.items():
        if name in absent and hasattr(kind, "dim_str"):  # not written, as it has no entry
            dtype = "i8" if "Int" in kind.__name__ else float
            axes = (int(x) if x.isdigit() else sizes[x] for x in kind.dim_str.split())
            out[name] = np.zeros([*axes], dtype)
            continue
        if not _has_arrays(kind) or name in absent:
            continue
        if get_origin(kind) is tuple:
            out[name] = tuple(arrays[f"{name}.{i}"] for i in range(len(sizes[name])))
        elif dataclasses.is_dataclass(kind):
            parts = [f.name for f in dataclasses.fields(kind)]
            out[name] = kind(**{part: arrays[f"{name}.{part}"] for part in parts})  # type: ignore[operator]
        else:
            out[name] = arrays[name]
    return out


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else value


# -- which two can be merged ------------------------------------------------------------------


def check_follows(first: Any, later: Any) -> None:
    """Check that ``later`` continues where ``first`` ends: settings, model and prompts.

    Raises:
        TypeError: another kind of report.
        ValueError: other settings, another model, or prompts that do not follow.
    """
    if not isinstance(later, type(first)):
        raise TypeError(f"merge: wanted another {type(first).__name__}; got {type(later).__name__}")
    one_model(first, later)
    follows = first.first_prompt + len(first.tokens)
    if later.first_prompt != follows:
        raise ValueError(
            f"merge: wanted a report that starts at prompt {follows} (first_prompt={follows}); got "
            f"one that starts at {later.first_prompt}"
        )


def one_model(first: Any, later: Any) -> None:
    """Check that two reports are of equal settings and one model.

    Raises:
        ValueError: they are not; the message names what differs.
    """
    if first.settings != later.settings:
        raise ValueError(
            f"merge: wanted reports of equal settings; got {first.settings} and {later.settings}"
        )
    for name, (mine, other) in _apart(first.model, later.model):
        raise ValueError(f"merge: wanted reports of one model; got {name} {mine!r} and {other!r}")


def _apart(
    first: Mapping[str, Any], later: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Names of the facts in which two reports differ, nested ones by their own names."""
    causes = ("name", "dtype", "fingerprint", "state")  # named before what follows from them
    for fact in [*causes, *sorted({*first, *later} - {*_UNLIKE, *causes})]:
        mine, other = first.get(fact), later.get(fact)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from (
                (name, (mine.get(name), other.get(name)))
                for name in sorted({*mine, *other})
                if mine.get(name) != other.get(name)
            )
        elif mine != other:
            yield fact, (mine, other)


def joined_facts(first: Any, later: Any) -> dict[str, Any]:
    """Facts of a merged report: notes on either part are kept."""
    given = [*first.model.get("given", ()), *later.model.get("given", ())]
    facts = {**first.model, **({"given": list(dict.fromkeys(given))} if given else {})}
    engines = [x for part in (first, later) if (x := part.model.get("engine"))]
    return facts | ({"engine": ", ".join(dict.fromkeys(engines))} if engines else {})


def told(model: Mapping[str, Any]) -> str:
    """A model's layers and what it was given, in sentences."""
    given = "; ".join(model.get("given", ()))
    return str(model["sites"]) + (f" Given: {given}." if given else "")


def first_tokens(
    starts: Sequence[Sequence[int]], prompt: Int[np.ndarray, "n"], position: Int[np.ndarray, "n"]
) -> Bool[np.ndarray, "n"]:
    """Whether these tokens are a prompt's first, or the first of a document packed into it."""
    packed = [(i << 32) | p for i, mine in enumerate(starts) if len(mine) > 1 for p in mine]
    first: np.ndarray = position == 0
    if packed:
        first |= np.isin((prompt.astype(np.int64) << 32) | position, packed)
    return first
