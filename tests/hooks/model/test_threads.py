"""Two threads on one model: each finds what it finds alone, or is refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks.model import apart
from tests.support import models
from tests.support.watching import Found, shape_checks_off, tiny_opt

IDS = models.tokens(batch=3, pos=12)
OTHER = models.tokens(batch=2, pos=9, seed=5)


# -- what a thread may do -----------------------------------------------------------------------


def forward(model: Any) -> Any:
    return model(OTHER).detach()


def run_with_hooks(model: Any) -> Any:
    def ablate(z: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(z)

    return model.run_with_hooks(OTHER, fwd_hooks=[(_z(model), ablate)]).detach()


def run_with_cache(model: Any) -> Any:
    logits, cache = model.run_with_cache(OTHER)
    return [logits.detach(), *(cache[name] for name in sorted(cache.keys()))]


def generate(model: Any) -> Any:
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    return model.generate(OTHER[:1], **options)


def training_step(model: Any) -> Any:
    inputs = [p for p in model.parameters() if p.requires_grad]
    loss = model(OTHER).float().square().mean()
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def noised(model: Any) -> Any:
    with hooks.NormNoise(sigma=0.2, seed=3).applied(model):
        return model(OTHER).detach()


def probe(model: Any) -> Any:
    return _arrays(hooks.collapse_probe(model, IDS, sigmas=[0.05, 0.3], draws=2))


def sweep(model: Any) -> Any:
    return _arrays(hooks.sweep(model, IDS, sigmas=[0.1, 0.3], replicates=2))


def spread(model: Any) -> Any:
    return _arrays(hooks.spread(model, IDS))


def interference(model: Any) -> Any:
    return _arrays(hooks.interference(model, IDS, draws=2))


def rank_profile(model: Any) -> Any:
    return _arrays(hooks.rank_profile(model, IDS))


def spectral_gap(model: Any) -> Any:
    return _arrays(hooks.spectral_gap(model, IDS))


def symmetry_gap(model: Any) -> Any:
    return _arrays(hooks.symmetry_gap(model, IDS, permutations=2))


def attention_sites(model: Any) -> Any:
    return hooks.attention_sites(model, IDS).to_frame().drop(columns=["got"], errors="ignore")


Job = Callable[[Any], Any]
USERS: tuple[Job, ...] = (
    forward, run_with_hooks, run_with_cache, generate, training_step, noised,
    probe, sweep, spread, interference,
)  # fmt: skip
OURS: tuple[Job, ...] = (
    probe, sweep, spread, rank_profile, spectral_gap, symmetry_gap, interference, attention_sites,
)  # fmt: skip


def _z(model: Any) -> str:
    return hooks.attention_sites(model).layers[0].z.hook


def _arrays(report: Any) -> Any:
    return report.to_frame()


# -- side by side -------------------------------------------------------------------------------


class Meeting:
    """A hook of the user's at which two threads wait for each other, once in each of their jobs."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.arrived: set[int] = set()
        self.met = False

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        with self.changed:
            if threading.get_ident() not in self.arrived:
                self.arrived.add(threading.get_ident())
                self.changed.notify_all()
                self.changed.wait_for(lambda: len(self.arrived) == 2, timeout=20)
            self.met |= len(self.arrived) == 2


def beside(model: Any, first: Job, second: Job, *, meet: bool = True) -> list[Any]:
    """Results of both, run in two threads that are inside of the model at the same time."""
    results: list[Any] = [None, None]
    meeting = Meeting()

    def run(index: int, job: Job) -> None:
        try:
            results[index] = job(model)
        except BaseException as error:
            results[index] = error

    with standing(model, meeting if meet else None):
        threads = [
            threading.Thread(target=run, args=(i, job)) for i, job in enumerate((first, second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meeting.met or not meet
    return results


@contextmanager
def standing(model: Any, hook_fn: Any) -> Iterator[None]:
    """A hook that holds for every pass, of any thread."""
    if hook_fn is None:
        yield
        return
    point = model.hook_dict[next(n for n in model.hook_dict if n.endswith("blocks.0.hook_in"))]
    point.add_hook(hook_fn)
    handle = point.fwd_hooks[-1]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks.remove(handle)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a.equals(b)) if hasattr(a, "equals") else bool(a == b)


def check(model: Any, first: Job, second: Job) -> None:
    """Each as alone, or refused by name; the user's own are never refused."""
    with (
        shape_checks_off(),
        standing(model, lambda tensor, hook: None),
    ):  # what a hook decides, it decides alone too
        alone = [job(model) for job in (first, second)]
    before = Found(model)
    with shape_checks_off():
        both = beside(model, first, second)
        Found(model).assert_same(before)
    for job, wanted, got in zip((first, second), alone, both, strict=True):
        if isinstance(got, hooks.UnsupportedModelError) and job in OURS:
            continue
        assert not isinstance(got, BaseException), f"{job.__name__}: {got!r}"
        assert same(wanted, got), job.__name__


FAST = [(u, OURS[i % len(OURS)]) for i, u in enumerate(USERS)] + [(noised, spread), (noised, sweep)]


@pytest.mark.parametrize(("user", "ours"), FAST, ids=lambda job: job.__name__)
def test_two_threads_find_what_each_finds_alone(user: Job, ours: Job) -> None:
    check(models.tiny_gpt2(), user, ours)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("user", USERS, ids=lambda job: job.__name__)
@pytest.mark.parametrize("ours", OURS, ids=lambda job: job.__name__)
def test_all_pairs_find_what_each_finds_alone(user: Job, ours: Job, kind: str) -> None:
    check(models.TINY[kind](), user, ours)


def test_a_model_compiled_in_place_is_so_again_when_the_last_thread_is_through() -> None:
    model = models.tiny_llama()
    model.original_model.compile(backend="eager")
    call = model.original_model._compiled_call_impl
    check(model, probe, sweep)
    assert model.original_model._compiled_call_impl is call
    assert not any(point._compiled_call_impl for point in model.hook_dict.values())


def test_two_models_in_two_threads_are_each_as_alone() -> None:
    """None is refused: nothing of theirs is shared."""
    two = [models.tiny_gpt2(), models.tiny_llama()]
    with shape_checks_off():
        wanted = [probe(model) for model in two]
        meeting, got = Meeting(), [None, None]

        def run(index: int) -> None:
            got[index] = probe(two[index])

        with standing(two[0], meeting), standing(two[1], meeting):
            threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert meeting.met
    assert all(map(same, wanted, got))


# -- training mode ------------------------------------------------------------------------------


def test_a_training_step_beside_a_probe_is_a_training_step() -> None:
    """Its dropout acts, and the probe's does not."""
    model = models.tiny_gpt2()
    wanted = probe(model)
    model.train()
    seen: list[bool] = []

    def look(tensor: Tensor, hook: Any) -> None:
        if threading.current_thread().name == "trains":
            seen.append(model.original_model.transformer.h[1].training)

    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            training_step(model)

    thread = threading.Thread(target=train, name="trains")
    with standing(model, look):
        thread.start()
        try:
            got = [probe(model) for _ in range(3)]
        finally:
            stop.set()
            thread.join()
    assert all(same(wanted, found) for found in got)
    assert seen
    assert all(seen)
    assert all(m.training for m in model.original_model.modules())


def test_a_pass_that_does_not_stop_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "PATIENCE", 0.2)
    model = models.tiny_gpt2().train()
    inside, go_on = threading.Event(), threading.Event()

    def hold(tensor: Tensor, hook: Any) -> None:
        inside.set()
        go_on.wait(60)

    thread = threading.Thread(
        target=lambda: model.run_with_hooks(OTHER, fwd_hooks=[("blocks.0.hook_in", hold)]),
        name="holds",
    )
    thread.start()
    try:
        assert inside.wait(60)
        with pytest.raises(hooks.UnsupportedModelError, match="'holds'"):
            spread(model)
    finally:
        go_on.set()
        thread.join()
    assert model.training
    spread(model)


# -- hooks that another thread put on for a while -------------------------------------------------


def _with_context(model: Any, job: Job, context: Any) -> Any:
    """What a job finds while another thread holds a context open, outside of any pass."""
    opened, close = threading.Event(), threading.Event()

    def hold() -> None:
        with context:
            opened.set()
            close.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert opened.wait(60)
        return job(model)
    finally:
        close.set()
        thread.join()


def test_a_context_of_another_thread_is_refused_by_name() -> None:
    model = models.tiny_gpt2()
    spread(model)
    for context in (
        model.hooks(fwd_hooks=[(_z(model), lambda z, hook: 0 * z)]),
        hooks.NormNoise(sigma=0.1).applied(model),
    ):
        with pytest.raises(hooks.UnsupportedModelError, match="put on for a while"):
            _with_context(model, spread, context)
    spread(model)


def test_a_hook_that_stands_holds_for_a_measurement_in_any_thread() -> None:
    model = models.tiny_gpt2()
    plain = spread(model)
    with standing(model, lambda x, hook: x.flip(1)):
        wanted = spread(model)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(spread(model)))
        thread.start()
        thread.join()
    assert same(wanted, got[0])
    assert not same(plain, wanted)


# -- weights --------------------------------------------------------------------------------------


def test_weights_written_to_meanwhile_are_refused_by_name() -> None:
    model = models.tiny_gpt2()
    spread(model)
    at_work, written = threading.Event(), threading.Event()

    def hold(tensor: Tensor, hook: Any) -> None:
        at_work.set()
        written.wait(60)

    def write() -> None:
        at_work.wait(60)
        with torch.no_grad():
            next(iter(model.original_model.parameters())).mul_(1.5)
        written.set()

    thread = threading.Thread(target=write)
    with standing(model, hold):
        thread.start()
        with pytest.raises(hooks.UnsupportedModelError, match="weights: wanted"):
            spread(model)
        thread.join()


# -- interventions --------------------------------------------------------------------------------


@pytest.mark.parametrize("tapped", [False, True])
def test_centred_attention_holds_in_every_thread(tapped: bool) -> None:
    model = tiny_opt() if tapped else models.tiny_llama()
    plain = forward(model)
    with hooks.CentredAttention().applied(model):
        wanted = forward(model)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(forward(model)))
        thread.start()
        thread.join()
        assert same(wanted, got[0])
        both = beside(model, forward, lambda model: model(IDS).detach(), meet=True)
        assert same(wanted, both[0])
    assert not torch.equal(plain, wanted)
    assert torch.equal(plain, forward(model))
