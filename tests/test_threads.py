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
from tests import models
from tests.watching import Found, shape_checks_off

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
    return hooks.attention_sites(model).to_frame().drop(columns=["got"], errors="ignore")


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


FAST = [(u, OURS[i % len(OURS)]) for i, u in enumerate(USERS)]


@pytest.mark.parametrize(("user", "ours"), FAST, ids=lambda job: job.__name__)
def test_two_threads_find_what_each_finds_alone(user: Job, ours: Job) -> None:
    check(models.tiny_gpt2(), user, ours)
