"""What surrounds a call: autocast, a default dtype, modes of torch, a forked process."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks.model import state
from hooks.model.inputs import without_cache
from tests.oracles.shifts import default_dtype
from tests.support import models
from tests.support.marks import slowly
from tests.support.watching import shape_checks_off

IDS = models.tokens(batch=3, pos=12)
JOBS: dict[str, Callable[[Any], Any]] = {
    "probe": lambda m: hooks.collapse_probe(m, IDS, sigmas=[0.05, 0.3], draws=2),
    "sweep": lambda m: hooks.sweep(m, IDS, sigmas=[0.1, 0.3], replicates=2),
    "spread": lambda m: hooks.spread(m, IDS),
    "rank": lambda m: hooks.rank_profile(m, IDS),
    "spectrum": lambda m: hooks.spectral_gap(m, IDS),
    "symmetry": lambda m: hooks.symmetry_gap(m, IDS, permutations=2),
    "interference": lambda m: hooks.interference(m, IDS, draws=2),
}


def clean_rows(model: Any, **options: Any) -> list[int]:
    """Sparse rows by layer and head of a plain hooked pass."""
    seen: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        seen.append(tensor.detach().float())

    names = [s.pattern for s in hooks.attention_sites(model)]
    with torch.no_grad():
        model.run_with_hooks(IDS, fwd_hooks=[(n, keep) for n in names], **options)
    # The first token sees itself alone: no row of choice.
    return [int((p[:, h, 1:].amax(-1) >= 0.95).sum()) for p in seen for h in range(4)]


def sparse_rows(report: Any) -> list[int]:
    frame = report.to_frame()
    first = frame[frame.sigma == frame.sigma.min()]
    return [int(n) for n in first.sort_values(["layer", "head"])["rows"]]


# -- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", [False, True], ids=["first", "after a plain probe"])
def test_a_probe_under_autocast_is_of_the_pass_under_autocast(
    dtype: torch.dtype, before: bool
) -> None:
    model = models.tiny_llama()
    plain = JOBS["probe"](model) if before else None
    with torch.autocast("cpu", dtype=dtype):
        report = JOBS["probe"](model)
        wanted = clean_rows(model, **without_cache(model))
    assert sparse_rows(report) == wanted
    assert report.model["dtype"] == f"float32, autocast {str(dtype).removeprefix('torch.')}"
    if plain is not None:
        with pytest.raises(ValueError, match="model"):
            plain.merge(report)


@pytest.mark.parametrize("name", JOBS)
def test_every_measurement_runs_under_autocast_and_says_so(name: str) -> None:
    model = models.tiny_gpt2()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = JOBS[name](model)
        assert torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            plain = JOBS[name](model)
    assert cast.model["dtype"] == "float32, autocast bfloat16"
    assert plain.model["dtype"] == "float32"
    again = JOBS[name](model)
    assert again.to_frame().equals(plain.to_frame())
    assert not cast.to_frame().equals(plain.to_frame())


def test_a_probe_leaves_no_weight_cast_without_gradients() -> None:
    """Autocast's cache would give such a weight to a later pass, which then trains nothing."""
    model = models.tiny_gpt2()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        JOBS["spread"](model)
        loss = model(IDS, return_type="loss")
    loss.backward()
    assert all(
        p.grad is not None and bool(p.grad.any())
        for n, p in model.named_parameters()
        if n.endswith("attn.q.weight") or "c_fc" in n
    )


def test_autocast_leaves_float64_alone() -> None:
    model = models.tiny_gpt2().to(torch.float64)
    plain = JOBS["spread"](model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = JOBS["spread"](model)
        assert state.pass_dtype(model) == torch.float64
    assert cast.to_frame().equals(plain.to_frame())


# -- modes of torch -----------------------------------------------------------------------------


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "enable grad": torch.enable_grad,
    "deterministic": deterministic,
}


@pytest.mark.parametrize(
    "mode",
    ["float64", "bfloat16", *slowly(*(m for m in MODES if m not in ("float64", "bfloat16")))],
)
@pytest.mark.parametrize("name", ["probe", "sweep", "symmetry", "interference"])
def test_modes_of_torch_change_nothing(name: str, mode: str) -> None:
    """GPT-2 makes nothing in the default dtype: neither may we."""
    wanted = JOBS[name](models.tiny_gpt2())
    model = models.tiny_gpt2()
    with shape_checks_off(), MODES[mode]():
        got = JOBS[name](model)
    assert got.to_frame().equals(wanted.to_frame())


# -- forks --------------------------------------------------------------------------------------


def _probe_in_child(queue: Any, model: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            sigma = JOBS["probe"](model).to_frame().to_numpy().tolist()
        except RuntimeError as error:
            sigma = str(error)
    queue.put((sigma, torch.get_num_threads(), [str(w.message) for w in said]))


def _in_a_fork(model: Any) -> tuple[Any, int, list[str]]:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_probe_in_child, args=(queue, model))
    with warnings.catch_warnings():  # Python 3.12 warns of threads and forks
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    try:
        return queue.get(timeout=60)
    finally:
        process.kill()
        process.join()


@contextmanager
def threads_of_torch(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_probes_with_one_thread_and_says_so() -> None:
    model = models.tiny_gpt2()
    with threads_of_torch(2):
        wanted = JOBS["probe"](model).to_frame().to_numpy().tolist()
        torch.randn(1 << 20).exp()  # the parent has OpenMP threads now
        got, n_threads, said = _in_a_fork(model)
    assert str(got) == str(wanted)
    assert n_threads == 1
    assert any("a forked process" in text for text in said)


@pytest.mark.parametrize("name", JOBS)
def test_a_default_device_is_for_tensors_of_the_users(name: str) -> None:
    """ "meta" stands for any other than the model's: nothing of ours may be made there."""
    model = models.tiny_gpt2()
    wanted = JOBS[name](model).to_frame()
    noise = hooks.NormNoise(sigma=0.2, seed=1)
    with noise.applied(model):
        logits = model(IDS)
    with torch.device("meta"):
        assert JOBS[name](model).to_frame().equals(wanted)
        with noise.applied(model):
            assert torch.equal(model(IDS), logits)
        assert torch.empty(1).device.type == "meta"


def _probed(pos: int) -> str:
    """In a process of its own, as a data loader's worker is."""
    ids = models.tokens(batch=3, pos=pos)
    report = hooks.collapse_probe(models.tiny_gpt2(), ids, sigmas=[0.05, 0.3], draws=2)
    return str(report.to_frame().to_numpy().tolist())


@pytest.mark.slow
def test_spawned_processes_probe_as_their_parent_does() -> None:
    wanted = [_probed(pos) for pos in (9, 12)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map_async(_probed, [9, 12]).get(timeout=240) == wanted


def test_a_fork_beside_a_measurement_is_refused_by_name() -> None:
    model = models.tiny_gpt2()
    inside, go_on = threading.Event(), threading.Event()

    def hold(tensor: Tensor, hook: Any) -> None:
        inside.set()
        go_on.wait(60)

    def measure() -> None:
        with model.hooks(fwd_hooks=[("blocks.0.hook_in", hold)]):
            JOBS["spread"](model)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        assert inside.wait(60)
        got, *_ = _in_a_fork(models.tiny_gpt2())
    finally:
        go_on.set()
        thread.join()
    assert "wanted a parent that was not measuring when it forked" in got


# -- memory -------------------------------------------------------------------------------------


def test_calls_keep_no_tensor_and_no_model_alive() -> None:
    """What is remembered of a model goes with it."""

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def measure() -> weakref.ref[Any]:
        model = models.tiny_llama()
        for name in ("probe", "sweep", "spread", "spectrum"):
            JOBS[name](model)
        assert alive() > before
        return weakref.ref(model)

    with shape_checks_off():
        before = 0
        assert measure()() is None
        before = alive()
        assert [measure()(), measure()(), measure()()] == [None] * 3
        assert alive() == before
