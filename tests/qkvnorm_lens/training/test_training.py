"""Training: one run is one result, also after a kill; recipes; shipped models."""

from __future__ import annotations

import csv
import dataclasses
import math
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from qkvnorm_lens.models.config import named_config
from qkvnorm_lens.models.model import QKVNormTransformer
from qkvnorm_lens.models.norms import Calibrated
from qkvnorm_lens.models.shipped import (
    checkpoint_card,
    checkpoint_path,
    checkpoints,
    load_checkpoint,
)
from qkvnorm_lens.training import trainer as training
from qkvnorm_lens.training.addition import VOCAB, draw
from qkvnorm_lens.training.checkpoints import make
from qkvnorm_lens.training.recipes import RECIPES, LearningRate, Recipe, make_optimizers
from qkvnorm_lens.training.run import evaluate, positions_for
from qkvnorm_lens.training.trainer import Stopped, Trainer, train
from tests.support.runs import TINY, log_of, same, tiny_run


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


ONE_STEP = Trainer.one_step
PAPER: dict[str, Any] = {
    "score_scale": "calibrated",
    "calibrated": True,
    "positional_embedding_type": "sinusoidal",
}


@pytest.mark.parametrize("recipe", ["paper", "modern", "modern-adamw"])
def test_a_killed_run_ends_with_the_same_bits(recipe: str, tmp_path: Path) -> None:
    run = tiny_run(recipe, **(PAPER if recipe == "paper" else {}))
    whole = train(run, tmp_path / "whole", progress=False)
    torch.manual_seed(5)  # the global random state is none of its business
    train(run, tmp_path / "cut", progress=False, stop_at=6, save_every=5)
    train(run, tmp_path / "cut", progress=False, stop_at=7, save_every=5)
    assert same(train(run, tmp_path / "cut", progress=False), whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert same(train(run, tmp_path / "cut", progress=False), whole), "a finished run stays"
    assert not whole.training


def test_rows_logged_after_the_last_state_are_made_again(tmp_path: Path) -> None:
    run = tiny_run()
    train(run, tmp_path / "whole", progress=False)
    train(run, tmp_path / "cut", progress=False, stop_at=5, save_every=5)
    state = (tmp_path / "cut" / "state.pt").read_bytes()
    train(run, tmp_path / "cut", progress=False, stop_at=9, save_every=100)
    (tmp_path / "cut" / "state.pt").write_bytes(state)  # killed before the next state
    train(run, tmp_path / "cut", progress=False)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def leaving(number: int, step: int) -> Callable[[Trainer, bool], bool]:
    """`Trainer.one_step`, in the midst of which a signal arrives."""

    def one_step(self: Trainer, stop: bool = False) -> bool:
        if self.step == step:
            signal.raise_signal(number)
        return ONE_STEP(self, stop)

    return one_step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("recipe", ["paper", "modern"])
def test_a_signal_loses_nothing(
    number: int, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = tiny_run(recipe), signal.getsignal(number)
    whole = train(run, tmp_path / "whole", progress=False)
    monkeypatch.setattr(Trainer, "one_step", leaving(number, 6))
    with pytest.raises(KeyboardInterrupt) as stop:
        train(run, tmp_path / "cut", progress=False)
    assert isinstance(stop.value, Stopped)
    assert stop.value.signal == number
    assert str(stop.value) == f"stopped after step 7 of 13, saved in {tmp_path / 'cut'}"
    assert signal.getsignal(number) == before
    seen: list[int] = []

    def noted(self: Trainer, stop: bool = False) -> bool:
        seen.append(self.step)
        return ONE_STEP(self, stop)

    monkeypatch.setattr(Trainer, "one_step", noted)
    assert same(train(run, tmp_path / "cut", progress=False), whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert seen == list(range(7, 13))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_last_is_not_forgotten(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run()
    whole = train(run, tmp_path / "whole", progress=False)
    monkeypatch.setattr(Trainer, "one_step", leaving(number, 12))
    with pytest.raises(Stopped, match="stopped after step 13 of 13"):
        train(run, tmp_path / "cut", progress=False)
    assert same(train(run, tmp_path / "cut", progress=False), whole)


@pytest.mark.parametrize("where", ["draw", "optimizer", "log"])
def test_an_impatient_interrupt_leaves_a_state_to_go_on_from(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a second Ctrl-C cuts in two is done again from the state before it."""
    run = tiny_run()
    whole = train(run, tmp_path / "whole", progress=False)
    train(run, tmp_path / "cut", progress=False, stop_at=5)

    def twice(*args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        if where == "draw":
            patch.setattr(training, "rows_of", twice)
        elif where == "optimizer":
            patch.setattr(torch.optim.Muon, "step", twice)
        else:
            patch.setattr(Trainer, "write_log", twice)
        with pytest.raises(Stopped, match="saved" if where == "draw" else "back to the last"):
            train(run, tmp_path / "cut", progress=False)
    assert same(train(run, tmp_path / "cut", progress=False), whole)
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_training_beside_the_main_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(train, tiny_run(), tmp_path / "there", progress=False).result()
    assert same(there, train(tiny_run(), tmp_path / "here", progress=False))
    assert signal.getsignal(signal.SIGINT) is before


def test_seeds_decide(tmp_path: Path) -> None:
    one, two = (train(tiny_run(), tmp_path / str(i), progress=False) for i in (1, 2))
    assert same(one, two)
    assert not same(one, train(tiny_run(seed=1), tmp_path / "3", progress=False))


def test_another_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    train(tiny_run(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds another run"):
        train(tiny_run(seed=1), tmp_path, progress=False)


def test_log_holds_loss_rate_and_accuracy(tmp_path: Path) -> None:
    train(tiny_run(), tmp_path, progress=False)
    rows = log_of(tmp_path)
    assert [int(r["step"]) for r in rows] == [4, 8, 12, 13]
    assert [r["per_token"] != "" for r in rows] == [False, True, False, True]
    assert [int(r["sequences"]) for r in rows] == [16 * s for s in (4, 8, 12, 13)]
    assert 0.0 <= float(rows[1]["per_token"]) <= 1.0


def test_a_loss_is_the_mean_over_the_steps_since_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the last stretch is short, and where a run goes on with another stretch."""
    every = dataclasses.replace(tiny_run(), log_every=1)
    train(every, tmp_path / "each", progress=False)
    each = [float(row["loss"]) for row in log_of(tmp_path / "each")]
    capsys.readouterr()
    train(tiny_run(), tmp_path / "four")
    bar = capsys.readouterr().err
    train(tiny_run(), tmp_path / "other", progress=False, stop_at=6)
    train(dataclasses.replace(tiny_run(), log_every=5), tmp_path / "other", progress=False)
    for folder, ends in (("four", [4, 8, 12, 13]), ("other", [4, 10, 13])):
        rows = log_of(tmp_path / folder)
        assert [int(row["step"]) for row in rows] == ends
        for row, start, end in zip(rows, [0, *ends], ends, strict=False):
            assert float(row["loss"]) == pytest.approx(sum(each[start:end]) / (end - start))
    assert f"loss={each[12]:.3f}" in bar
    assert f"loss={each[12] / 4:.3f}" not in bar


@pytest.mark.parametrize("rows", [7, 30])
def test_the_log_measures_as_many_sums_as_it_is_told(rows: int, tmp_path: Path) -> None:
    run = dataclasses.replace(tiny_run(), eval_rows=rows)
    model = train(run, tmp_path, progress=False)
    last = log_of(tmp_path)[-1]
    wanted = evaluate(model, run.split, rows=rows)
    assert float(last["exact"]) == wanted.exact
    assert float(last["per_token"]) == wanted.per_token
    assert wanted.per_token != evaluate(model, run.split, rows=4000).per_token


@pytest.mark.parametrize("bf16", [False, True])
def test_it_learns(bf16: bool, tmp_path: Path) -> None:
    run = tiny_run(
        Recipe("muon", lr=2e-2, schedule="cosine", warmup=5, batch_size=64), steps=40, bf16=bf16
    )
    before = evaluate(QKVNormTransformer(run.config), "pairs-train", rows=200).per_token
    after = evaluate(train(run, tmp_path, progress=False), "pairs-train", rows=200).per_token
    assert after > before + 0.2


def test_length_parts_change_rounding_only(tmp_path: Path) -> None:
    models = [
        train(
            dataclasses.replace(tiny_run("modern-adamw", steps=2), length_parts=parts),
            tmp_path / str(parts),
            progress=False,
        )
        for parts in (1, 4)
    ]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_papers_scales_are_fixed_before_the_first_step(tmp_path: Path) -> None:
    run = tiny_run("paper", **PAPER)
    factors = []
    for steps in (1, 9):
        model = train(run, tmp_path, progress=False, stop_at=steps)
        factors.append([m.weight.clone() for m in model.modules() if isinstance(m, Calibrated)])
    assert all(f != 1 for f in factors[0])
    assert factors[0] == factors[1]


def test_each_sequence_gets_its_own_shift() -> None:
    cfg = named_config("baseline", "pre")
    tokens = torch.zeros(500, 7, dtype=torch.long)
    positions = positions_for(cfg, tokens, (0,))
    assert torch.equal(positions - positions[:, :1], torch.arange(7).expand(500, 7))
    assert positions[:, 0].min() == 0
    assert positions[:, 0].max() == 50
    assert torch.equal(positions, positions_for(cfg, tokens, (0,)))
    assert positions_for(named_config("small", "pre"), tokens, (0,)).shape == (1, 7)


def test_halving_on_a_plateau_counts_epochs_without_a_better_loss() -> None:
    rate = LearningRate(Recipe("adamw", lr=1.0, schedule="plateau", epoch=2, patience=3), 100)
    seen = []
    for loss in [3.0, 2.0, 2.5, 2.0, 2.0, 1.0, 1.5, 1.1, 1.0]:
        for _ in range(2):
            rate.saw(loss)
        seen.append(rate.at(0))
    assert seen == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_cosine_warms_up_and_ends_at_a_hundredth() -> None:
    rate = LearningRate(Recipe("adamw", lr=1.0, schedule="cosine", warmup=10), 1000)
    assert rate.at(0) == pytest.approx(0.1)
    assert rate.at(9) == pytest.approx(1.0, abs=1e-3)
    assert rate.at(1000) == pytest.approx(0.01)
    assert rate.at(500) == pytest.approx(0.505, abs=1e-3)


def test_recipes_are_the_papers_and_decay_what_they_say() -> None:
    paper = RECIPES["paper"]
    assert (paper.lr, paper.weight_decay, paper.batch_size) == (3e-4, 0.01, 128)
    assert (paper.epoch, paper.patience, paper.schedule) == (2000, 3, "plateau")
    model = QKVNormTransformer(named_config("study", "qkv"))
    n = len(list(model.parameters()))
    for name, recipe in RECIPES.items():
        groups = [g for o in make_optimizers(model, recipe) for g in o.param_groups]
        assert sum(len(g["params"]) for g in groups) == n
        gain = model.layers[0].attn.q_norm.weight
        decay = next(g["weight_decay"] for g in groups if any(p is gain for p in g["params"]))
        assert decay == (0.01 if name == "paper" else 0.0)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: tiny_run("best"), r"recipe: wanted one of .*'paper'"),
        (lambda: tiny_run(split="paper-train"), "n_ctx: wanted at least 36 tokens for these sums"),
        (lambda: tiny_run(steps=0), "steps: wanted an integer >= 1; got 0"),
        (lambda: Recipe("sgd", lr=1.0, schedule="cosine"), "optimizer: wanted one of"),
        (lambda: Recipe("adamw", lr=1.0, schedule="step"), "schedule: wanted one of"),
        (lambda: Recipe("adamw", lr=0.0, schedule="cosine"), "lr: wanted a number > 0"),
    ],
)
def test_bad_runs_say_what_is_wanted(make_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_evaluate_puts_the_training_mode_back() -> None:
    model = QKVNormTransformer(named_config("study", "pre", **TINY)).train()
    first = evaluate(model, "pairs-train", rows=50)
    assert model.training
    assert first == evaluate(model, "pairs-train", rows=50, batch_size=7)


# --- shipped models --------------------------------------------------------------------------


def test_there_are_shipped_models_and_each_can_be_made_again() -> None:
    assert "addition-pre" in checkpoints()
    assert set(checkpoints()) <= set(make.RUNS)
    with pytest.raises(ValueError, match=r"wanted one of \['addition.*got 'no-such'"):
        load_checkpoint("no-such")


def test_a_shipped_model_is_made_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "processes", lambda device: 2)
    with pytest.raises(SystemExit):
        make.main(["addition-pre", "--out", str(tmp_path / "run")])
    assert "wanted one process; got 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", checkpoints())
def test_shipped_model_is_as_good_as_its_card_says(name: str) -> None:
    bridge = load_checkpoint(name)
    card = checkpoint_card(name)
    split = card["run"]["split"]
    measured = evaluate(bridge, make.RUNS[name].split, rows=4000, seed=(77,))
    claimed = card["accuracy"]["in distribution"]
    assert claimed["split"] == split
    error = 5 * math.sqrt(claimed["per_token"] * (1 - claimed["per_token"]) / (3.4 * 4000))
    assert measured.per_token == pytest.approx(claimed["per_token"], abs=max(error, 0.003))
    if name == "addition-pre":
        assert measured.per_token >= 0.95
    run = make.RUNS[name]
    assert card["run"]["seed"] == run.seed
    assert card["run"]["steps"] == run.steps
    folder = checkpoint_path(name)
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 4 * 2**20
    with (folder / "log.csv").open(newline="") as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == run.steps


@pytest.mark.parametrize("name", checkpoints())
def test_shipped_model_answers_by_generation(name: str) -> None:
    bridge = load_checkpoint(name)
    batch = draw("pairs-train", 12, seed=4)
    right = 0
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        text = "".join(VOCAB[t] for t in tokens)
        answer = "".join(VOCAB[t] for t in targets).strip("*").rstrip("]")
        question = text[: text.index("=") + 1]
        ids = bridge.generate(
            bridge.to_tokens(question), max_new_tokens=6, do_sample=False, verbose=False
        )
        said = "".join(VOCAB[t] for t in ids[0, len(question) :].tolist()).split("]")[0]
        right += said == answer
    assert right >= 9


@pytest.mark.parametrize("name", checkpoints())
def test_shipped_model_has_sparse_rows(name: str) -> None:
    bridge = load_checkpoint(name)
    batch = draw(make.RUNS[name].split, 100, seed=9)
    _, cache = bridge.run_with_cache(batch.tokens)
    real = (batch.tokens != VOCAB.index("*"))[:, None, 1:]
    content = 0
    for layer in range(bridge.cfg.n_layers):
        top = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, 1:].max(-1)
        content += int(((top.values >= 0.95) & (top.indices > 0) & real).sum())
    assert content > 1000
