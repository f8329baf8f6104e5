"""``qkvnorm-lens train``: what it writes, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qkvnorm_lens import training
from qkvnorm_lens.cli import build_parser, main, train as train_command
from qkvnorm_lens.models import loading
from qkvnorm_lens.models.config import NormSpec, named_config
from qkvnorm_lens.training.addition import SPLITS, draw, get_split
from qkvnorm_lens.training.recipes import RECIPES, get_recipe
from qkvnorm_lens.training.run import TEST_SEED, evaluate
from qkvnorm_lens.training.trainer import Trainer

TINY: dict[str, Any] = {"n_layers": 1, "d_model": 16, "d_head": 8, "n_heads": 2, "d_mlp": 16}
SMALL = [
    "--steps",
    "12",
    "--batch-size",
    "8",
    "--threads",
    "1",
    "--test-rows",
    "50",
    "--eval-rows",
    "20",
]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The command sets their number for its process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny configuration, as save_pretrained writes it."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(named_config("study", "qkv", **TINY).to_json()))
    return path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path) -> Command:
    """Exit code, standard output and standard error of ``train``, tiny unless told otherwise."""

    def call(*argv: str, out: str = "run") -> tuple[int, str, str]:
        capsys.readouterr()
        given = ["--config", str(file), "--split", "small-train", *SMALL, *argv]
        code = main(["train", "--out", str(tmp_path / out), *given])
        return (code, *capsys.readouterr())

    return call


def plan(*argv: str) -> Any:
    return train_command.plan(build_parser().parse_args(["train", "--out", "x", *argv]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_writes_state_log_model_and_card(command: Command, tmp_path: Path) -> None:
    code, out, err = command()
    assert code == 0, err
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {"state.pt", "run.json", "log.csv", "model"}
    card = json.loads((folder / "model" / "card.json").read_text())
    assert card["sequences"] == 12 * 8
    assert card["run"] == json.loads((folder / "run.json").read_text())
    assert (folder / "model" / "log.csv").read_text() == (folder / "log.csv").read_text()
    bridge = loading.load_model(str(folder / "model"))
    assert training.adds_integers(bridge)
    assert training.trained_on(loading.find(str(folder / "model"))) == SPLITS["small-train"]
    assert bridge.cfg.placement == "qkv"
    for kind, split in training.tests_of("small-train", 32).items():
        wanted = dataclasses.asdict(evaluate(bridge, split, rows=50))
        got = card["accuracy"][kind]
        assert {key: got[key] for key in wanted} == wanted, kind
        assert got["seed"] == TEST_SEED
        line = next(line for line in out.splitlines() if line.startswith(kind))
        shares = [f"{100 * v:.2f}%" for k, v in wanted.items() if k != "rows"]
        assert line.removeprefix(kind).split() == [*shares, "50"]
    assert "12/12" in err  # the progress bar


def test_a_stopped_run_goes_on_by_itself(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(out="whole")[0] == 0
    step = Trainer.one_step

    def interrupted(self: Trainer, stop: bool = False) -> bool:
        if self.step == 7:
            raise KeyboardInterrupt
        return step(self, stop)

    monkeypatch.setattr(Trainer, "one_step", interrupted)
    code, out, err = command("--save-every", "5", out="cut")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == (
        f"qkvnorm-lens: stopped after step 7 of 12, saved in {tmp_path / 'cut'}; "
        "the same command goes on from there"
    )
    assert not (tmp_path / "cut" / "model").exists()
    first: list[int] = []

    def noted(self: Trainer, stop: bool = False) -> bool:
        first.append(self.step)
        return step(self, stop)

    monkeypatch.setattr(Trainer, "one_step", noted)
    code, out, _ = command(out="cut")
    assert code == 0
    assert first == list(range(7, 12))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    again = command(out="cut")  # a finished run is measured again, and not trained
    assert again[:2] == (0, out)
    assert len(first) == 5


def test_termination_is_143(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.one_step

    def terminated(self: Trainer, stop: bool = False) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return step(self, stop)

    monkeypatch.setattr(Trainer, "one_step", terminated)
    code, out, err = command()
    assert (code, out) == (143, "")
    assert "stopped after step 1 of 12" in err
    assert (tmp_path / "run" / "state.pt").exists()


def test_the_number_of_processes_is_part_of_the_run(command: Command, tmp_path: Path) -> None:
    assert command()[0] == 0
    note = tmp_path / "run" / "run.json"
    held = json.loads(note.read_text())
    assert held["processes"] == 1
    note.write_text(json.dumps({**held, "processes": 2}))
    code, _, err = command()
    assert code == 1
    assert "wanted processes = 1, got 2; choose another --out" in err


@pytest.mark.slow
def test_two_processes_make_one_run(file: Path, tmp_path: Path) -> None:
    """Each has a batch of its own; terminated, they stop behind one step and lose nothing."""

    def start(out: str) -> subprocess.Popen[str]:
        launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
        asked = f"-m qkvnorm_lens train --config {file} --split small-train --out {tmp_path / out}"
        sizes = "--steps 200 --batch-size 8 --save-every 5 --test-rows 50 --eval-rows 20"
        return subprocess.Popen(
            f"{launch} {asked} {sizes} --threads 1".split(),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = start("whole")
    out, err = whole.communicate(timeout=500)
    assert whole.returncode == 0, err
    assert out.count("in distribution") == 1
    card = json.loads((tmp_path / "whole" / "model" / "card.json").read_text())
    assert (card["run"]["processes"], card["sequences"]) == (2, 2 * 8 * 200)
    with (tmp_path / "whole" / "log.csv").open(newline="") as log:
        assert [row["sequences"] for row in csv.DictReader(log)] == ["1600", "3200"]
    cut = start("cut")
    try:
        while not (tmp_path / "cut" / "state.pt").exists():
            assert cut.poll() is None
            time.sleep(0.01)
    finally:
        cut.terminate()
    _, err = cut.communicate(timeout=500)
    assert "stopped after step" in err
    assert not (tmp_path / "cut" / "model").exists()
    again = start("cut")
    _, err = again.communicate(timeout=500)
    assert again.returncode == 0, err
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_run_in_the_directory_is_refused(command: Command, tmp_path: Path) -> None:
    assert command()[0] == 0
    before = weights(tmp_path / "run")
    code, out, err = command("--seed", "3", "--lr", "0.5")
    assert (code, out) == (1, "")
    assert "holds another run" in err
    for part in ("config.seed = 3, got 100", "seed = 3, got 0", "recipe.lr = 0.5, got 0.004"):
        assert part in err
    assert "steps" not in err  # what agrees is not said
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config", "huge"], "--config: wanted one of ['alternate'"),
        (
            ["--config", "absent.json"],
            "--config: wanted a file that can be read; got 'absent.json'",
        ),
        (["--split", "hard"], "--split: wanted one of ['easy-train'"),
        (["--recipe", "old"], "--recipe: wanted one of ['modern'"),
        (["--split", "paper-train"], "n_ctx: wanted at least 36 tokens for these sums; got 32"),
        (["--device", "gpu"], "--device: wanted one that PyTorch can use; got 'gpu'"),
    ],
)
def test_what_does_not_fit_is_one_line(
    command: Command, tmp_path: Path, argv: list[str], said: str
) -> None:
    code, out, err = command(*argv)
    assert (code, out) == (1, "")
    assert err.startswith(f"qkvnorm-lens: error: {said}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "wanted JSON"), ("[]", "got a list"), ("{}", 'wanted "placement"')],
)
def test_a_bad_configuration_file_is_named(
    command: Command, file: Path, text: str, said: str
) -> None:
    file.write_text(text)
    code, _, err = command()
    assert code == 1
    assert str(file) in err
    assert said in err


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps", "0"],
        ["--batch-size", "many"],
        ["--lr", "nan"],
        ["--lr", "-1"],
        ["--seed", "-1"],
        ["--placement", "post"],
        ["--threads", "0"],
    ],
)
def test_wrong_usage(command: Command, argv: list[str]) -> None:
    code, _, err = command(*argv)
    assert code == 2
    assert argv[0] in err
    assert repr(argv[1]) in err


def test_a_file_wants_a_split(file: Path) -> None:
    with pytest.raises(ValueError, match=r"--split: wanted one of .* from a file"):
        plan("--config", str(file))


@pytest.mark.parametrize("name", sorted(train_command.DEFAULTS))
def test_named_configurations_have_sums_recipe_and_budget(name: str) -> None:
    run = plan("--config", name)
    default = train_command.DEFAULTS[name]
    assert run.config.to_json() == named_config(name, "pre").to_json()
    assert (run.split, get_recipe(run.recipe), run.steps) == (
        default.split,
        RECIPES[default.recipe],
        default.steps,
    )
    assert get_split(run.split).max_length <= run.config.n_ctx
    paper = name in ("baseline", "alternate", "large")
    assert (run.steps * get_recipe(run.recipe).batch_size > 109_000_000) == paper
    kinds = training.tests_of(run.split, run.config.n_ctx)
    assert list(kinds) == ["in distribution", "interpolation", "extrapolation"]
    counts = [set(SPLITS[split].counts) for split in kinds.values()]
    assert not set.intersection(*counts), "a kind of sums is of one count only"
    trained, between, beyond = counts
    assert min(trained) < min(between) <= max(between) < max(trained) < min(beyond)
    assert not trained & between


def test_options_change_what_they_name(file: Path) -> None:
    given = "--recipe paper --lr 1e-4 --batch-size 64 --seed 5 --bf16 --steps 7 --split pairs-train"
    run = plan("--config", "study", "--placement", "none", *given.split())
    recipe = dataclasses.replace(RECIPES["paper"], lr=1e-4, batch_size=64)
    assert (run.recipe, run.seed, run.bf16, run.steps) == (recipe, 5, True, 7)
    assert run.config.to_json() == named_config("study", "none", seed=5).to_json()
    assert draw(run.split, 3, seed=0).tokens.shape == draw("pairs-train", 3, seed=0).tokens.shape
    assert plan("--config", str(file), "--split", "easy-train").config.placement == "qkv"
    moved = plan("--config", str(file), "--split", "easy-train", "--placement", "pre").config
    assert (moved.placement, moved.norm) == ("pre", NormSpec(over="input"))


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from qkvnorm_lens.cli import main; main(['train', '--help']);"
        "sys.exit(', '.join({'torch', 'numpy', 'transformer_lens'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--placement {none,pre,qkv}" in done.stdout
