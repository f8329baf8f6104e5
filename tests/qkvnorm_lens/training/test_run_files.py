"""Training runs on disk: a state and a log are those that were written, or refused by name."""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qkvnorm_lens.training import trainer as training
from qkvnorm_lens.training.run_files import RunFileError
from qkvnorm_lens.training.trainer import Trainer, train
from tests.support import mutations
from tests.support.runs import log_of, same, tiny_run

RUN = tiny_run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """The weights and directory of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    return train(RUN, folder, progress=False, save_every=4), folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 9, with states of steps 8 and 9 and two rows of the log."""
    folder = tmp_path_factory.mktemp("half")
    train(RUN, folder, progress=False, save_every=4, stop_at=9)
    return folder


@pytest.fixture
def cut(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "cut"))


def undigested(folder: Path, log: bool = True) -> None:
    """A directory as the build before left it."""
    state = torch.load(folder / "state.pt", weights_only=True)
    if log:
        del state["log"]
    torch.save(state, folder / "state.pt")
    (folder / "state.earlier.pt").unlink(missing_ok=True)


# -- what was damaged -----------------------------------------------------------------------------


def goes_on(cut: Path, whole: tuple[torch.nn.Module, Path], what: str) -> bool:
    """Whether a damaged run goes on, to the same bits; it is refused by name otherwise."""
    try:
        model = train(RUN, cut, progress=False)
    except RunFileError as error:
        named = str(error).startswith(f"{error.path}: wanted ")
        assert named & ("; got " in str(error)) & ("delete it" in str(error)), what  # noqa: PT017
        return False
    assert same(model, whole[0]), what
    assert log_of(cut) == log_of(whole[1]), what
    return True


def mutate(
    name: str, seeds: range, half: Path, whole: Any, folder: Path, *, digested: bool = True
) -> int:
    went_on = 0
    for seed in seeds:
        cut = folder / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(half, cut)
        if not digested:
            undigested(cut)
        what, data = mutations.damaged((cut / name).read_bytes(), seed, mutations.BYTES)
        (cut / name).write_bytes(data)
        went_on += goes_on(cut, whole, f"{name}: {what}")
    return went_on


@pytest.mark.parametrize("digested", [True, False])
@pytest.mark.parametrize("name", ["state.pt", "log.csv"])
def test_a_damaged_run_is_refused_or_ends_with_the_same_bits(
    name: str, digested: bool, half: Path, whole: Any, tmp_path: Path
) -> None:
    mutate(name, range(12), half, whole, tmp_path, digested=digested or name == "log.csv")


@pytest.mark.long
@pytest.mark.parametrize("digested", [True, False])
@pytest.mark.parametrize("name", ["state.pt", "log.csv"])
def test_six_hundred_of_them(
    name: str, digested: bool, half: Path, whole: Any, tmp_path: Path
) -> None:
    mutate(name, range(100, 250), half, whole, tmp_path, digested=digested or name == "log.csv")


def test_what_is_said_of_a_damaged_state_is_the_way_on(
    cut: Path, whole: tuple[torch.nn.Module, Path]
) -> None:
    state = cut / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(RunFileError, match=r"goes on from state.earlier.pt \(step 8\)") as refused:
        train(RUN, cut, progress=False)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    state.unlink()
    assert goes_on(cut, whole, "from the state before")


def test_without_an_earlier_state_it_begins_again(
    cut: Path, whole: tuple[torch.nn.Module, Path]
) -> None:
    for name in ("state.pt", "state.earlier.pt"):
        (cut / name).write_bytes(b"PK")
    with pytest.raises(RunFileError, match="there is no other state, and it begins at step 0"):
        train(RUN, cut, progress=False)
    (cut / "state.pt").unlink()
    with pytest.raises(RunFileError, match=r"state.earlier.pt: .* it begins at step 0"):
        train(RUN, cut, progress=False)
    (cut / "state.earlier.pt").unlink()
    assert goes_on(cut, whole, "from the beginning")


def test_an_earlier_state_stays_where_the_later_one_takes_its_place(
    cut: Path, whole: tuple[torch.nn.Module, Path]
) -> None:
    """A run killed between the two renames has no state.pt, and a whole state of before."""
    shutil.move(cut / "state.pt", cut / "state.earlier.pt")
    assert goes_on(cut, whole, "from state.earlier.pt")


def test_a_state_of_the_build_before_is_gone_on_from(
    cut: Path, whole: tuple[torch.nn.Module, Path]
) -> None:
    undigested(cut)
    assert goes_on(cut, whole, "without a digest")


@pytest.mark.parametrize("field", training.STATE)
def test_a_whole_archive_that_is_no_state_is_refused(field: str, cut: Path) -> None:
    undigested(cut)
    state = torch.load(cut / "state.pt", weights_only=True)
    del state[field]
    torch.save(state, cut / "state.pt")
    with pytest.raises(RunFileError, match=f"got one without {field}"):
        train(RUN, cut, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("model", {}), ("optimizers", []), ("rate", 3), ("optimizers", [{"state": {}}] * 2)],
)
def test_nor_is_one_with_other_contents(field: str, value: Any, cut: Path) -> None:
    undigested(cut)
    state = torch.load(cut / "state.pt", weights_only=True) | {field: value}
    torch.save(state, cut / "state.pt")
    with pytest.raises((RunFileError, ValueError), match="wanted"):
        train(RUN, cut, progress=False)


def test_a_state_with_a_pickle_that_would_run_is_refused(cut: Path, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"run": Runs()}, cut / "state.pt")
    with pytest.raises(RunFileError, match="wanted the state that was saved there"):
        train(RUN, cut, progress=False)
    assert not (tmp_path / "ran").exists()


# -- the log --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_a_run_killed_before_its_first_state_has_each_row_once(
    stop: int, whole: tuple[torch.nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.one_step

    def killed(self: Trainer, stop_: bool = False) -> bool:
        if self.step == stop:
            raise SystemExit
        return step(self, stop_)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", killed)
        with pytest.raises(SystemExit):
            train(RUN, tmp_path, progress=False, save_every=100)
    assert goes_on(tmp_path, whole, "before its first state")


def test_half_a_row_behind_the_state_is_made_again(
    cut: Path, whole: tuple[torch.nn.Module, Path]
) -> None:
    with (cut / "log.csv").open("a") as file:
        file.write("12,19")
    assert goes_on(cut, whole, "half a row")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("4,64,0.1,0.001,2.5,,", "line 2 of 8 fields, steps rising; got .*7 fields"),
        ("4,64,0.1,0.001,x.5,,,", "line 2 of 8 fields"),
        ("9,64,0.1,0.001,2.5,,,", "line 3 of 8 fields, steps rising; got .*step 8 after 9"),
        ("4,64,0.1,0.001,2.5,,,", "rows with the numbers that were written; got others"),
        ("4,64,0.1,0.001,\udcff,,,", "line 2 of 8 fields"),
    ],
)
@pytest.mark.parametrize("digested", [True, False])
def test_a_damaged_line_of_the_log_is_named(
    line: str, said: str, digested: bool, cut: Path, whole: tuple[torch.nn.Module, Path]
) -> None:
    log = cut / "log.csv"
    lines = log.read_text().splitlines()
    lines[1] = line
    log.write_bytes("".join(f"{x}\n" for x in lines).encode(errors="surrogateescape"))
    if not digested:
        undigested(cut)
    if not digested and "numbers" in said:  # a number within a row: no digest, no way to see it
        train(RUN, cut, progress=False)
        return
    with pytest.raises(RunFileError, match=said):
        train(RUN, cut, progress=False)
    log.unlink()  # what the message says
    assert same(train(RUN, cut, progress=False), whole[0])


# -- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Any]:
    """No file may grow beyond so many bytes, as far as the system is concerned."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 4096, 40_000])
def test_a_full_disk_leaves_the_state_before_and_says_so(
    room: int, cut: Path, whole: tuple[torch.nn.Module, Path], small_disk: Any
) -> None:
    state = (cut / "state.pt").read_bytes()
    small_disk(room)
    with pytest.raises(OSError, match="could not be written") as full:
        train(RUN, cut, progress=False)
    small_disk(-1)
    assert full.value.errno == errno.EFBIG
    assert f"{cut / 'state.pt'} holds step 9, whole: make room and start the same run" in str(
        full.value
    )
    assert (cut / "state.pt").read_bytes() == state
    assert goes_on(cut, whole, "after a full disk")


def test_a_disk_that_is_full_from_the_beginning(
    whole: tuple[torch.nn.Module, Path], small_disk: Any, tmp_path: Path
) -> None:
    small_disk(20)
    with pytest.raises(OSError, match="nothing is saved yet: make room and start the same run"):
        train(RUN, tmp_path, progress=False, save_every=4)
    small_disk(-1)
    assert goes_on(tmp_path, whole, "after a full disk")
