"""Reports on disk: whole or refused, whatever happened to the file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

import hooks
from qkvnorm_lens.page.report import html_report
from tests.support import mutations
from tests.support.paths import DATA

OLD = DATA / "reports"
KINDS: dict[str, Any] = {
    "collapse": hooks.CollapseReport,
    "sweep": hooks.SweepReport,
    "spread": hooks.SpreadReport,
    "interference": hooks.InterferenceReport,
    "rank": hooks.RankReport,
    "spectrum": hooks.SpectrumReport,
    "symmetry": hooks.SymmetryReport,
}
FILES = sorted(path.stem for path in OLD.glob("*.safetensors"))


def kind_of(name: str) -> Any:
    return KINDS[name.partition("_")[0]]


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that a report holds, by name."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from flat(getattr(value, f.name), f"{at}.{f.name}")
    elif isinstance(value, tuple) and value and isinstance(value[0], np.ndarray):
        for i, one in enumerate(value):
            yield f"{at}.{i}", one
    else:
        yield at, dict(value) if at == ".model" else value


def equal(one: Any, other: Any) -> bool:
    mine, theirs = dict(flat(one)), dict(flat(other))
    return mine.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype
        and value.shape == theirs[name].shape
        and value.tobytes() == theirs[name].tobytes()
        if isinstance(value, np.ndarray)
        else value == theirs[name]
        for name, value in mine.items()
    )


def new_file(name: str, folder: Path) -> Path:
    """A stored report, written as this build writes them."""
    path: Path = kind_of(name).load(OLD / f"{name}.safetensors").save(folder / name)
    return path


# -- what was saved -------------------------------------------------------------------------------


# Settings that there were not yet.
NEW = {"strict": "sampled", "pooled": False, "part": "scale", "outliers": 3}


@pytest.mark.parametrize("name", FILES)
def test_reports_of_the_build_before_load_equal(name: str) -> None:
    path = OLD / f"{name}.safetensors"
    report = kind_of(name).load(path)
    with safe_open(path, "np") as file:
        words = file.metadata()
        arrays = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    assert "digest" not in words
    for at, value in flat(report):
        field = at[1:]
        if field in (
            "strict_low",
            "strict_high",
            "moments",
            "read",
            "squares",
        ):  # there were none yet
            assert value.size == 0
        elif isinstance(value, np.ndarray):
            stored = arrays.pop(field)
            assert stored.dtype == value.dtype
            np.testing.assert_array_equal(stored, value)
            assert value.flags.writeable
        elif field.removeprefix("settings.") in NEW:
            assert value == NEW[field.removeprefix("settings.")]
        elif field.startswith("settings."):
            assert json.loads(words["settings"])[field.removeprefix("settings.")] == json.loads(
                json.dumps(value, default=dataclasses.asdict)
            )
        elif field not in words:  # there was none yet
            assert value == ()
        else:
            assert json.loads(words[field]) == json.loads(json.dumps(value))
    assert not arrays
    assert str(report)
    assert len(report.to_frame())


@pytest.mark.parametrize("name", FILES)
def test_a_new_file_has_a_digest_and_loads_equal(name: str, tmp_path: Path) -> None:
    before = kind_of(name).load(OLD / f"{name}.safetensors")
    path = before.save(tmp_path / "new")
    with safe_open(path, "np") as file:
        assert file.metadata()["digest"].startswith("sha256:")
    assert equal(kind_of(name).load(path), before)
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_does_not_hang_on_the_order_in_the_file(tmp_path: Path) -> None:
    path = new_file("sweep", tmp_path)
    words, arrays = mutations.read(path.read_bytes())
    turned = dict(reversed(arrays.items()))
    path.write_bytes(save(turned, metadata=dict(reversed(words.items()))))
    assert equal(hooks.SweepReport.load(path), hooks.SweepReport.load(OLD / "sweep.safetensors"))


# -- what was damaged -----------------------------------------------------------------------------


def refused_or_equal(name: str, seeds: range, folder: Path) -> int:
    kind = kind_of(name)
    original = kind.load(OLD / f"{name}.safetensors")
    data, refused = new_file(name, folder).read_bytes(), 0
    for seed in seeds:
        what, changed = mutations.damaged(data, seed)
        path = folder / "damaged"
        path.write_bytes(changed)
        try:
            loaded = kind.load(path)
        except hooks.ReportFileError as error:
            named = str(error).startswith(f"{path}: {error.field}: wanted ")
            assert named & ("; got " in str(error)), what  # noqa: PT017
            refused += 1
        else:
            assert equal(loaded, original), what
    return refused


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_report_is_refused_or_equal(name: str, tmp_path: Path) -> None:
    assert refused_or_equal(name, range(84), tmp_path) > 70


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_two_thousand_damaged_reports_are_refused_or_equal(name: str, tmp_path: Path) -> None:
    assert refused_or_equal(name, range(1000, 1400), tmp_path) > 350


def used(report: Any) -> None:
    """Everything that a report can be asked; what it refuses, it refuses by name."""
    str(report)
    for by in _BY[type(report)]:
        report.to_frame(by)
    if isinstance(report, hooks.SweepReport):
        _or_named(report.sigma_at)
        _or_named(lambda: report.merge(report))
    if isinstance(report, hooks.InterferenceReport):
        _or_named(lambda: report.merge(report))
    if isinstance(report, hooks.CollapseReport):
        for by in ("model", "layer", "head"):
            _or_named(lambda by=by: report.sigma_at(0.01, by=by))
        report.fragile(5)
        report.fragile(5, content=True)
        report.kept_rows()
        html_report(report, views=False)
        for row in np.flatnonzero(report.kept.draw >= 0):
            report.kept_noise(int(row))
        _or_named(lambda: report.merge(report))
        follows = dataclasses.replace(report, first_prompt=len(report.tokens) + report.first_prompt)
        str(report.merge(follows))


_BY: dict[type, tuple[str, ...]] = {
    hooks.CollapseReport: ("head", "layer", "model"),
    hooks.SweepReport: ("sigma", "prompt", "draw"),
    hooks.SpreadReport: ("token", "head", "layer", "model"),
    hooks.InterferenceReport: ("head", "layer", "model"),
    hooks.RankReport: ("prompt", "site"),
    hooks.SpectrumReport: ("prompt", "head", "layer", "length"),
    hooks.SymmetryReport: ("variant", "layer", "permutation", "distance"),
}


def _or_named(call: Any) -> None:
    try:
        call()
    except ValueError as error:
        assert re.search("wanted .*; got ", str(error))  # noqa: PT017


def refused_or_whole(name: str, seeds: range, folder: Path) -> int:
    """Of files without a digest, in which a number can change within its range unseen."""
    kind = kind_of(name)
    data, refused = (OLD / f"{name}.safetensors").read_bytes(), 0
    for seed in seeds:
        what, changed = mutations.damaged(data, seed)
        path = folder / "damaged"
        path.write_bytes(changed)
        try:
            loaded = kind.load(path)
        except hooks.ReportFileError:
            refused += 1
            continue
        with warnings.catch_warnings():  # of a sum that is infinite, or a mean of nothing
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                used(loaded)
            except Exception as error:
                raise AssertionError(f"{what}: {error!r}") from error
    return refused


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_report_without_a_digest_is_refused_or_can_be_used(
    name: str, tmp_path: Path
) -> None:
    assert refused_or_whole(name, range(28), tmp_path) > 12


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_two_thousand_of_them_too(name: str, tmp_path: Path) -> None:
    assert refused_or_whole(name, range(1000, 1300), tmp_path) > 150


# -- what a call would not have taken -------------------------------------------------------------


def rewritten(name: str, change: Any, folder: Path) -> Path:
    """A stored report (without a digest) in which something was changed, under a true header."""
    words, arrays = mutations.read((OLD / f"{name}.safetensors").read_bytes())
    held = {n: json.loads(w) for n, w in words.items() if n != "format"}
    change(held, arrays)
    path = folder / "changed"
    words = {"format": words["format"]} | {n: json.dumps(value) for n, value in held.items()}
    path.write_bytes(save({n: np.array(a) for n, a in arrays.items()}, metadata=words))
    return path


SETTINGS: list[tuple[str, str, Any]] = [
    ("collapse", "sigmas", [0.4, 0.1]),
    ("collapse", "sigmas", [0.1, 0.7]),
    ("collapse", "sigmas", "ab"),
    ("collapse", "sigmas", [0.1, True]),
    ("collapse", "on", "qx"),
    ("collapse", "law", "cauchy"),
    ("collapse", "method", "guess"),
    ("collapse", "shared", "all"),
    ("collapse", "sparse", 1.5),
    ("collapse", "layers", [-1]),
    ("collapse", "layers", [2**40]),
    ("collapse", "draws", 3),
    ("collapse", "draws", 10**18),
    ("collapse", "draws", "2"),
    ("collapse", "seed", -1),
    ("collapse", "keep", 39),
    ("collapse", "keep", 1.0),
    ("collapse", "keep_rows", 1),
    ("sweep", "replicates", 0),
    ("sweep", "replicates", 10**15),
    ("sweep", "sigmas", [0.0, 0.1]),
    ("sweep", "at", "nowhere"),
    ("sweep", "rows", "sparse"),
    ("spread", "of", "z"),
    ("spread", "of", "q"),
    ("spread", "without_first", 1),
    ("interference", "on", ["v"]),
    ("interference", "constants", [1.0, -2.0]),
    ("interference", "constants", [1.0, float("inf")]),
    ("interference", "spare_first", None),
    ("rank", "layers", [1, 0]),
    ("rank", "sites", []),
    ("spectrum", "k", 1),
    ("spectrum", "k", 2**62),
    ("spectrum", "lengths", [8, 3]),
    ("symmetry", "permutations", 2),
    ("symmetry", "variants", ["as is"] * 4),
    ("symmetry", "keep_first", True),
]


@pytest.mark.parametrize(("name", "setting", "value"), SETTINGS)
def test_settings_are_those_of_a_call_and_of_the_arrays(
    name: str, setting: str, value: Any, tmp_path: Path
) -> None:
    path = rewritten(name, lambda held, _: held["settings"].update({setting: value}), tmp_path)
    with pytest.raises(hooks.ReportFileError, match=r"wanted .*; got "):
        kind_of(name).load(path)


NUMBERS: list[tuple[str, str, Any]] = [
    ("collapse", "table.start", 10**9),
    ("collapse", "table.start", -1),
    ("collapse", "table.layer", 1),
    ("collapse", "table.head", 4),
    ("collapse", "table.prompt", 2),
    ("collapse", "table.key", -1),
    ("collapse", "table.a", np.nan),
    ("collapse", "table.a", 2.5),
    ("collapse", "table.s", np.inf),
    ("collapse", "table.cutoff", -1),
    ("collapse", "kept.start", 10**9),
    ("collapse", "kept.key", 10**6),
    ("collapse", "kept.layer", 7),
    ("collapse", "kept.sigma", 0.9),
    ("collapse", "kept.clean", -0.5),
    ("collapse", "rows", -1),
    ("collapse", "rows", 10**6),
    ("collapse", "able", 0),
    ("collapse", "loose", 1e9),
    ("collapse", "level", np.nan),
    ("sweep", "correct", 100),
    ("sweep", "agree", -1),
    ("sweep", "positions", -1),
    ("spread", "position.0", 5),
    ("spread", "prompt.1", 2),
    ("spread", "norms.0", np.nan),
    ("spread", "weights.1", -1),
    ("interference", "to_first", 100),
    ("interference", "kl", np.nan),
    ("interference", "variance", -1),
    ("rank", "first_share", 1.5),
    ("rank", "numbers", -1),
    ("spectrum", "length.0", 0),
    ("spectrum", "singular.0", np.nan),
    ("spectrum", "prompt", 9),
    ("symmetry", "orders.0", 0),
    ("symmetry", "tv", 2),
    ("symmetry", "kl", np.nan),
    ("symmetry", "similarity", 3),
]


@pytest.mark.parametrize(("name", "field", "value"), NUMBERS)
def test_numbers_that_no_measurement_gives_are_named(
    name: str, field: str, value: Any, tmp_path: Path
) -> None:
    def change(held: Any, arrays: Any) -> None:
        array = arrays[field].copy()
        array.reshape(-1)[:1] = value
        arrays[field] = array

    with pytest.raises(hooks.ReportFileError) as refused:
        kind_of(name).load(rewritten(name, change, tmp_path))
    assert field.partition(".")[0] in refused.value.field


def test_a_report_of_another_kind_is_named(tmp_path: Path) -> None:
    for name in FILES:
        other = next(kind for kind in KINDS.values() if kind is not kind_of(name))
        with pytest.raises(
            hooks.ReportFileError, match=r"wanted the format 'qkvnorm-lens .*; got 'qkvnorm"
        ):
            other.load(new_file(name, tmp_path))


def test_the_error_is_a_value_error_with_its_parts_and_survives_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "junk"
    path.write_bytes(b"not a report at all")
    with pytest.raises(ValueError, match="header: wanted a sweep report") as refused:
        hooks.SweepReport.load(path)
    error = refused.value
    assert isinstance(error, hooks.ReportFileError)
    again = pickle.loads(pickle.dumps(error))
    for name in ("path", "field", "wanted", "got"):
        assert getattr(again, name) == getattr(error, name)
    assert str(again) == str(error)


def test_lies_about_sizes_cost_no_memory(tmp_path: Path) -> None:
    """A process that may have little more memory than it has refuses headers of terabytes."""
    data = (OLD / "sweep.safetensors").read_bytes()
    n = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + n])
    for i, shape in enumerate([[2**40], [2**20, 2**20, 1], [2**31, 2**31]]):
        end = int(np.prod(shape, dtype=object)) * 8
        lies = head | {"kl": {"dtype": "F64", "shape": shape, "data_offsets": [0, end]}}
        text = json.dumps(lies).encode()
        (tmp_path / f"{i}").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
    (tmp_path / "3").write_bytes((2**40).to_bytes(8, "little") + data[8:])
    code = """
import resource, sys, hooks
room = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for i in range(4):
    try:
        hooks.SweepReport.load(f"{sys.argv[1]}/{i}")
    except hooks.ReportFileError as error:
        print(error.field)
"""
    if not Path("/proc/self/statm").exists():
        pytest.fail("this test reads /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) == 4, done.stderr


# -- whole or not at all --------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 10, 1000])
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_leaves_the_file_of_before_and_says_so(
    room: int, before: bool, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    report, path = hooks.RankReport.load(OLD / "rank.safetensors"), tmp_path / "rank.safetensors"
    if before:
        report.save(path)
    held = path.read_bytes() if before else None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match="not written") as full:
            report.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert full.value.errno == errno.EFBIG
    assert full.value.filename == str(path)
    said = "the file of before is whole" if before else "no part of it was left"
    assert said in str(full.value)
    assert (path.read_bytes() if before else None) == held
    assert list(tmp_path.iterdir()) == ([path] if before else [])


def test_a_kill_while_it_is_written_leaves_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_file("sweep", tmp_path)
    held = path.read_bytes()

    def killed(*names: Any) -> None:
        raise SystemExit

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            with pytest.raises(SystemExit):
                hooks.SweepReport.load(path).save(path)
        assert path.read_bytes() == held


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    path = new_file("sweep", tmp_path)
    link = tmp_path / "link"
    link.symlink_to(path)
    report = hooks.SweepReport.load(link)
    path.write_bytes(b"")
    report.save(link)
    assert link.is_symlink()
    assert equal(hooks.SweepReport.load(path), report)
    report.save("/dev/null")
    assert not Path("/dev/null").is_file()


def test_a_file_is_open_to_those_that_new_files_are_open_to(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert new_file("sweep", tmp_path).stat().st_mode == plain.stat().st_mode
