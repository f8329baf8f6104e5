"""What stands around a call: torch's modes, a user's hooks, changes of the model between calls."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.fuzz import zoo
from tests.fuzz.cases import LONG, Case
from tests.support.families import VOCAB

HEAD, COLUMN = 1, 4  # which a user's hook acts on, in block 0


class Wrong(AssertionError):
    """Other numbers than the model's own, or a model that is not left as it was found."""


def with_head(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[:, HEAD] = value
    return x


def with_column(z: Tensor) -> Tensor:
    z = z.clone()
    z[:, :, COLUMN] = 0.0
    return z


def cached_v(model: zoo.Model, n: int) -> Tensor:
    """[key, kv head, d], the same whatever the prompt."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(64, model.n_kv_heads, 8, generator=generator, dtype=torch.float64)[:n]


@contextlib.contextmanager
def torch_as_it_is() -> Iterator[None]:
    """The oracle in eval mode, without autocast, whatever the user set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def mode(case: Case, model: zoo.Model) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if case.mode in ("train", "dropout") and case.call != "applied":
            model.bridge.train()
            stack.callback(model.bridge.eval)
            if case.mode == "dropout":
                stack.enter_context(_dropout(model.bridge))
        elif case.mode == "inference":
            stack.enter_context(torch.inference_mode())
        elif case.mode == "float64 by default":
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        elif case.mode == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if case.mode != "grad":
            stack.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def _dropout(bridge: Any) -> Iterator[None]:
    """Rates above 0, which act in training mode alone."""
    rates = [
        (module, name)
        for module in bridge.modules()
        for name in ("p", "dropout", "attention_dropout")
        if isinstance(vars(module).get(name), float)
    ]
    before = [getattr(module, name) for module, name in rates]
    for module, name in rates:
        setattr(module, name, 0.3)
    try:
        yield
    finally:
        for (module, name), rate in zip(rates, before, strict=True):
            setattr(module, name, rate)


@contextlib.contextmanager
def hooks_of(case: Case, model: zoo.Model) -> Iterator[None]:
    """The user's, standing on the bridge."""
    prefix = "encoder_blocks.0.attn." if model.family.has_decoder else "blocks.0.attn."

    def scale(q: Tensor, hook: Any) -> Tensor:
        return q * 1.5

    def ablate(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, HEAD] = 0.0
        return z

    def zero(pattern: Tensor, hook: Any) -> Tensor:
        return with_head(pattern, 0.0)

    def patch(v: Tensor, hook: Any) -> Tensor:
        return cached_v(model, v.shape[1]).to(v.dtype)[None].expand(len(v), -1, -1, -1).clone()

    q = "hook_q"
    if case.family == "qwen3" or (case.family == "ours"):
        q = "hook_rot_q"

    def column(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, COLUMN] = 0.0
        return z

    def long(z: Tensor, hook: Any) -> Tensor:
        return with_head(z.transpose(1, 2), 0.0).transpose(1, 2) if z.shape[1] > LONG else z

    kinds: Mapping[str, Any] = {
        "long": ("hook_z", long),
        "column": ("hook_z", column),
        "scale q": (q, scale),
        "ablate z": ("hook_z", ablate),
        "zero pattern": ("hook_pattern", zero),
        "patch v": ("hook_v_normed" if case.family == "ours" else "hook_v", patch),
    }
    if not case.hook or case.hook == "torch":
        with torch_hook(case, model.bridge.original_model):
            yield
        return
    name, hook_fn = kinds[case.hook]
    with model.bridge.hooks(fwd_hooks=[(prefix + name, hook_fn)]):
        yield


@contextlib.contextmanager
def torch_hook(case: Case, hf: Any) -> Iterator[None]:
    """The user's own forward hook of torch, on a module of Hugging Face's model."""
    if case.hook != "torch":
        yield
        return
    end = zoo.FAMILIES[case.family].matters.removesuffix(".weight")
    module = next(m for name, m in hf.named_modules() if name.endswith(end))
    handle = module.register_forward_hook(lambda module, args, out: out * 1.3)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def changes(case: Case, model: zoo.Model, report: Callable[[], Any]) -> Iterator[Any]:
    """A first call, then a change, of the bridge and of the oracle alike; undone at the end."""
    change = case.change

    def first() -> Any:
        """What makes the library remember; its own verdict is another case's."""
        with contextlib.suppress(Exception):
            return report()
        return None

    if not change or change == "merged":
        yield None
        return
    if change.startswith("adapter"):
        on = change == "adapter on"
        _switch(model, not on)
        first()
        _switch(model, on)
        yield None
        return
    if change == "weight undone":
        with _scaled_weight(model, "data"):
            first()
        yield None
        return
    if change == "weight back from zero":
        with _scaled_weight(model, "zero"):
            first()
        yield None
        return
    before = first()
    if change == "asked before":
        yield before
    elif change == "attention":
        model.bridge.original_model.set_attn_implementation("sdpa")
        try:
            yield None
        finally:
            model.bridge.original_model.set_attn_implementation("eager")
    elif change == "buffer":
        with _slower_rotation(model):
            yield None
    elif change == "window":
        with _window(model, 6):
            yield None
    else:
        how = {"weight in place": "in place", "weight replaced": "replaced"}.get(change, "data")
        which = case.seed if change == "merged after a change" else 0
        with _scaled_weight(model, how, which):
            yield before


def _switch(model: zoo.Model, on: bool) -> None:
    for hf in (model.bridge.original_model, model.hf, model.plain):
        zoo.switch_adapter(hf, on)


@contextlib.contextmanager
def _slower_rotation(model: zoo.Model) -> Iterator[None]:
    """Rotary positions of half the frequency."""
    three = (model.bridge.original_model, model.hf, model.plain)
    buffers = [b for hf in three for name, b in hf.named_buffers() if name.endswith("inv_freq")]
    buffers = list({id(b): b for b in buffers}.values())
    assert len(buffers) >= 3
    for b in buffers:
        b.mul_(0.5)
    try:
        yield
    finally:
        for b in buffers:
            b.mul_(2.0)


@contextlib.contextmanager
def _window(model: zoo.Model, width: int) -> Iterator[None]:
    configs = [m.config for m in (model.bridge.original_model, model.hf, model.plain)]
    before = [c.sliding_window for c in configs]
    for config in configs:
        config.sliding_window = width
    try:
        yield
    finally:
        for config, was in zip(configs, before, strict=True):
            config.sliding_window = was


@contextlib.contextmanager
def _scaled_weight(model: zoo.Model, how: str, which: int = 0) -> Iterator[None]:
    """Another weight in the bridge and in the oracle."""
    undo = []
    for hf in (model.bridge.original_model, model.hf, model.plain):
        name, p = _weight(hf, model.family, which)
        old = p.detach().clone()
        other = old * 1.5 + 0.25 * torch.linspace(-1, 1, old.numel()).to(old).view_as(old)
        if how == "zero":
            other = torch.zeros_like(old)
        if which == 1:  # a few rows
            other[:5], other[8:] = old[:5], old[8:]
        elif which == 2:
            other[..., 0] = old[..., 0]
        owner: Any = None
        last = ""
        if how in ("data", "zero"):
            p.data.copy_(other)
        elif how == "in place":
            with torch.no_grad():
                p.copy_(other)
        else:
            owner_name, _, last = name.rpartition(".")
            owner = hf.get_submodule(owner_name)
            setattr(owner, last, torch.nn.Parameter(other))
        undo.append((p, old, owner, last))
    try:
        yield
    finally:
        for p, old, owner, last in undo:
            if owner is None:
                p.data.copy_(old)
            else:
                setattr(owner, last, p)


def _weight(hf: Any, family: zoo.Family, which: int) -> tuple[str, torch.nn.Parameter]:
    """One that every pattern hangs on (0), the embedding (1), or one of the MLP's (2)."""
    named = [(n.replace("_original_component.", ""), n, p) for n, p in hf.named_parameters()]
    for clean, name, p in named:
        if (
            (which == 0 and clean.endswith(family.matters))
            or (which == 1 and p.ndim == 2 and len(p) == VOCAB)
            or (which == 2 and p.ndim > 1 and re.search("mlp|fc|DenseRelu|output.dense", clean))
        ):
            return name, p
    raise AssertionError((family.name, which))


@contextlib.contextmanager
def left_as_found(model: zoo.Model) -> Iterator[None]:
    bridge = model.bridge
    state = torch.get_rng_state()
    flags = [m.training for m in bridge.modules()]
    before = _hooked(bridge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    if _hooked(bridge) != before:
        raise Wrong("other hooks were left")
    if flags != [m.training for m in bridge.modules()]:
        bridge.eval()
        raise Wrong("another training mode was left")
    if not torch.equal(state, torch.get_rng_state()):
        raise Wrong("the global random state was moved")
    if not torch.is_grad_enabled() or torch.get_default_dtype() != torch.float32:
        raise Wrong("torch's own settings were left changed")


def _hooked(bridge: Any) -> list[str]:
    """Bridges of MLPs stand with hooks of their own."""
    return [name for name, point in bridge.hook_dict.items() if point.has_hooks()]
