"""Training on addition or text, with the recipe of Menary et al. 2024 or a modern one.

    loss = - sum over scored positions of log p(target) / their number

Menary et al. 2024 (arXiv 2406.17837), appendix on training. A run is a pure function of its `Run`:
the rows of a step are drawn from (seed, process, step), so a run that was stopped and resumed ends
with the same bits as an uninterrupted one, and no global random state matters.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from hooks.arguments import (
    check_booleans,
    check_device,
    check_integers,
    check_kind,
    check_path,
    check_text,
)
from hooks.corpus import Stopped as Stopped
from qkvnorm_lens.models import QKVNormTransformer
from qkvnorm_lens.training.addition import Batch
from qkvnorm_lens.training.recipes import LearningRate, get_recipe, make_optimizers
from qkvnorm_lens.training.run import (
    SCORES,
    Run,
    describe,
    get_task,
    measured,
    positions_for,
    rows_of,
)
from qkvnorm_lens.training.run_files import RunFileError, cut_log, note_log, read_state, write_state

_TRAIN_STREAM, _SHIFT_STREAM, _CALIBRATION_STREAM = 1, 2, 3
_FIELDS: Final = ("step", "sequences", "seconds", "lr", "loss")
STATE: Final = ("run", "model", "optimizers", "rate", "step", "seconds", "loss_sum", "losses")


class _Signals:
    """Notes SIGINT and SIGTERM, to obey them between two steps; a second one does not wait.

    Args:
        patient: the second one waits too (`torchrun` repeats what it is sent).
    """

    def __init__(self, patient: bool) -> None:
        self.patient = patient
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = bool(self.asked), number
        if again and not self.patient:
            raise KeyboardInterrupt


class Trainer:
    """A `Run` in progress; usually started by `train`."""

    def __init__(
        self, run: Run, out: Path, *, device: str = "cpu", compile_model: bool = False
    ) -> None:
        from accelerate import Accelerator

        self.run = run
        self.recipe = get_recipe(run.recipe)
        self.task = get_task(run.split)
        self.fields = (*_FIELDS, *SCORES[type(self.task)])
        self.out = out
        self.accelerator = Accelerator(cpu=torch.device(device).type == "cpu")
        self.processes: int = self.accelerator.num_processes
        several = self.processes > 1
        self.device = self.accelerator.device if several else torch.device(device)
        if self.device.type == "cpu":  # accelerate's "cpu:0" cannot be read from a file again
            self.device = torch.device("cpu")
        self.model = QKVNormTransformer(run.config).to(self.device)
        self.optimizers = make_optimizers(self.model, self.recipe)
        self.rate = LearningRate(self.recipe, run.steps)
        self.step = 0
        self.seconds = 0.0
        self.loss_sum, self.losses = 0.0, 0
        self.saved: Path | None = None  # the latest whole state, and its step
        self.saved_step = 0
        self.whole = True  # nothing of a step is done, or all of it and its row of the log
        forward: nn.Module = self.model
        if several:
            forward = self.accelerator.prepare_model(self.model)
        if compile_model:
            forward = cast(nn.Module, torch.compile(forward, dynamic=True))
        self.forward = forward
        out.mkdir(parents=True, exist_ok=True)
        held = next((p for p in (self.state_path, self.earlier_path) if p.exists()), None)
        if held is not None:
            self._load(held)
        elif self.accelerator.is_main_process:  # of a run that was killed before its first state
            nothing = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
            cut_log(self.log_path, nothing, 0, self.fields)
        if held is None and (run.config.calibrated or run.config.score_scale == "calibrated"):
            self._calibrate()

    @property
    def state_path(self) -> Path:
        """Where the state is kept from which a killed run resumes."""
        return self.out / "state.pt"

    @property
    def earlier_path(self) -> Path:
        """Where the state before that one is kept."""
        return self.out / "state.earlier.pt"

    @property
    def log_path(self) -> Path:
        """Where the log is kept."""
        return self.out / "log.csv"

    def _calibrate(self) -> None:
        rows = rows_of(self.task, self.recipe.batch_size, (self.run.seed, _CALIBRATION_STREAM))
        batch = rows.to(self.device)
        positions = positions_for(
            self.run.config, rows.tokens, (self.run.seed, _CALIBRATION_STREAM, 0)
        )
        with self.model.calibrating():
            self.model(batch.tokens, position_ids=positions.to(self.device))

    def one_step(self, stop: bool = False) -> bool:
        """Draw the rows of this step, and update the weights.

        Returns whether any process wants to stop: all must stop after the same step.
        """
        run, rank = self.run, self.accelerator.process_index
        self.model.train()
        lr = self.rate.at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        drawn = (run.seed, _TRAIN_STREAM, rank, self.step)
        batch = rows_of(self.task, self.recipe.batch_size, drawn)
        n_scored = int(batch.scored.sum())
        parts = batch.by_length(run.length_parts)
        loss = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            seed = (run.seed, _SHIFT_STREAM, rank, self.step, i)
            with self._no_sync(i + 1 < len(parts)):
                part_loss = self._loss(part, seed) / n_scored
                part_loss.backward()
            loss += part_loss.detach()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.whole = False
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ours = torch.stack([loss, torch.full_like(loss, stop)])
        value, stops = self.accelerator.reduce(ours, "mean").tolist()
        self.rate.saw(value)
        self.loss_sum, self.losses = self.loss_sum + value, self.losses + 1
        self.step += 1
        return bool(stops)

    @property
    def mean_loss(self) -> float:
        """Mean loss over the steps since the last row of the log."""
        return self.loss_sum / self.losses

    def _no_sync(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        if not wanted or self.processes == 1:
            return contextlib.nullcontext()
        apart = self.accelerator.no_sync(self.forward)
        return cast(contextlib.AbstractContextManager[None], apart)

    def _loss(self, part: Batch, seed: tuple[int, ...]) -> torch.Tensor:
        """Loss summed over scored positions; only their logits are made."""
        positions = positions_for(self.run.config, part.tokens, seed).to(self.device)
        batch = part.to(self.device)
        at = batch.scored.nonzero(as_tuple=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.bf16):
            logits = self.forward(batch.tokens, position_ids=positions, at=at)
        return F.cross_entropy(logits.float(), batch.targets[at], reduction="sum")

    def write_log(self) -> None:
        """One row, with accuracy if it is due."""
        run = self.run
        row: dict[str, Any] = {
            "step": self.step,
            "sequences": self.step * self.recipe.batch_size * self.processes,
            "seconds": round(self.seconds, 1),
            "lr": self.rate.at(self.step - 1),
            "loss": self.mean_loss,
        }
        self.loss_sum, self.losses = 0.0, 0
        if self.step % run.eval_every == 0 or self.step == run.steps:
            row |= measured(self.model, self.task, run.eval_rows, self.device)
        try:
            new = not self.log_path.exists()
            with self.log_path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self.fields, restval="")
                if new:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise self._not_written(error, "the log's row") from error

    def save(self) -> None:
        """Write the state, whole or not at all.

        Raises:
            OSError: it can't be written; the message says what was kept and how to go on.
        """
        state = {
            "run": repr(describe(self.run, self.processes)),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rate": self.rate.state,
            "step": self.step,
            "seconds": self.seconds,
            "loss_sum": self.loss_sum,
            "losses": self.losses,
        }
        try:
            state["log"] = note_log(self.log_path)
            write_state(self.state_path, self.earlier_path, state)
        except OSError as error:
            raise self._not_written(error, "the state") from error
        self.saved, self.saved_step = self.state_path, self.step

    def _not_written(self, error: OSError, what: str) -> OSError:
        """What is kept of the run, and how to resume it."""
        on = "make room and start the same run again"
        kept = f"nothing is saved yet: {on}"
        if self.saved is not None and self.saved.exists():
            kept = f"{self.saved} holds step {self.saved_step}, whole: {on}, and it goes on there"
        at = f"step {self.step} of {self.run.steps}"
        return OSError(error.errno, f"{at}: {what} could not be written: {error.strerror}; {kept}")

    def _load(self, path: Path) -> None:
        try:
            state = read_state(path, self.device, STATE)
            self._take(state, path)
        except RunFileError as error:
            raise RunFileError(path, f"{error.message}; {self._way_on(path)}") from error
        self.saved, self.saved_step = path, self.step
        if self.accelerator.is_main_process:  # rows written after that state was saved
            cut_log(self.log_path, state.get("log"), self.step, self.fields)

    def _way_on(self, path: Path) -> str:
        """What to do about a state that was damaged."""
        again = "delete it and start the same run again"
        if path == self.state_path and self.earlier_path.exists():
            with contextlib.suppress(RunFileError, OSError):
                step = read_state(self.earlier_path, self.device, STATE)["step"]
                earlier = f"{self.earlier_path.name} (step {step})"
                return f"{again}: it goes on from {earlier}, which is whole"
        return f"{again}: there is no other state, and it begins at step 0"

    def _take(self, state: dict[str, Any], path: Path) -> None:
        wanted = repr(describe(self.run, self.processes))
        if state["run"] != wanted:
            raise ValueError(
                f"{self.out} holds another run: wanted {wanted}, got {state['run']}; choose "
                "another directory"
            )
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if {*state["rate"]} != {*self.rate.state}:
                raise ValueError("another learning rate's numbers")
            self.rate.state = state["rate"]
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            said = f"{error!s:.120}"
            raise RunFileError(
                path, f"wanted weights and moments of this run; got {said}"
            ) from error
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss_sum, self.losses = state["loss_sum"], state["losses"]


def train(
    run: Run,
    out: str | os.PathLike[str],
    *,
    device: str = "cpu",
    compile_model: bool = False,
    save_every: int = 500,
    stop_at: int | None = None,
    progress: bool = True,
) -> QKVNormTransformer:
    """Train, or resume the run that a directory holds; returns the model, in eval mode.

    The directory gets ``log.csv`` (loss, learning rate, accuracy) and ``state.pt``, from which a
    stopped run resumes, with the same result as an uninterrupted one; the state before that one is
    kept as ``state.earlier.pt``. A state, and the log's rows up to it, are checked before the run
    resumes. Under ``accelerate launch`` or ``torchrun`` the processes share the work. On Ctrl-C or
    SIGTERM the step is finished and the state saved; a second Ctrl-C does not wait for that
    (several processes do).

    Args:
        run: what to train.
        out: the directory.
        device: ``"cpu"``, ``"cuda"``, ..; under accelerate, accelerate chooses.
        compile_model: use ``torch.compile``.
        save_every: steps between states on disk.
        stop_at: stop early at this step, as a kill would, but with the state saved.
        progress: show a progress bar.

    Raises:
        ValueError: the directory holds another run.
        RunFileError: it holds a damaged state or log; the message says how to go on.
        OSError: state or log can't be written (a full disk); the message says what was kept.
        Stopped: interrupted; a ``KeyboardInterrupt``.
    """
    check_kind("run", run, Run, "a Run")
    compile_model, progress = check_booleans(compile_model=compile_model, progress=progress)
    (save_every,) = check_integers(save_every=(save_every, 1))
    if stop_at is not None:
        (stop_at,) = check_integers(stop_at=(stop_at, 0))
    check_device("device", check_text("device", device))
    out = check_path("out", out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: wanted a directory; got the file {out}")
    trainer = Trainer(run, out, device=device, compile_model=compile_model)
    main = trainer.accelerator.is_main_process
    last = run.steps if stop_at is None else min(stop_at, run.steps)
    bar = tqdm(total=run.steps, initial=trainer.step, unit="step", disable=not (progress and main))
    began = time.monotonic() - trainer.seconds
    stop = False
    alone = trainer.processes == 1
    with bar, _Signals(patient=not alone) as signals:
        try:
            while trainer.step < last and not stop:
                stop = trainer.one_step(bool(signals.asked))
                bar.update()
                trainer.seconds = time.monotonic() - began
                if main and (trainer.step % run.log_every == 0 or trainer.step == run.steps):
                    bar.set_postfix(loss=f"{trainer.mean_loss:.3f}")
                    trainer.write_log()
                trainer.whole = True
                stop = stop or (alone and bool(signals.asked))
                if main and (trainer.step % save_every == 0 or trainer.step == last):
                    trainer.save()
        except KeyboardInterrupt as error:
            raise _stopped(trainer, signals.asked or signal.SIGINT) from error
        if stop or signals.asked:
            raise _stopped(trainer, signals.asked or signal.SIGINT)
    return trainer.model.eval()


def _stopped(trainer: Trainer, number: int) -> Stopped:
    """Save what is whole, and say where the run was stopped."""
    if not trainer.whole:
        return Stopped(f"stopped within a step, back to the last state in {trainer.out}", number)
    if trainer.accelerator.is_main_process:
        trainer.save()
    where = f"after step {trainer.step} of {trainer.run.steps}"
    return Stopped(f"stopped {where}, saved in {trainer.out}", number)
