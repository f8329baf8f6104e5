"""A recipe as the arguments and files of what serves models; what they can't express is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from hooks.measures.cache.affine import HQQ, KIVI, Quanto
from hooks.measures.cache.formats import CacheFormat, CacheRole, Float8, Full, text_of
from hooks.measures.cache.ggml import GGML, rotation


@dataclass(frozen=True)
class LayerFormats:
    """An attention layer: its index, its formats, and the channels of its heads, if known."""

    layer: int
    k: CacheFormat
    v: CacheFormat
    widths: tuple[int, int] | None = None

    def of(self, role: CacheRole) -> tuple[CacheFormat, int | None]:
        """The format and the channels of its keys or values."""
        width = None if self.widths is None else self.widths[role == "v"]
        return (self.k if role == "k" else self.v), width


Layers = Sequence[LayerFormats]
_WHAT: dict[CacheRole, str] = {"k": "keys", "v": "values"}


def _refuse(engine: str, wanted: str, got: str) -> ValueError:
    return ValueError(f"recipe: wanted {wanted}, which is what {engine} has; got {got}")


def vllm(layers: Layers) -> str:
    """``--kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0 7``."""
    kinds = {form for one in layers for form in (one.k, one.v) if not isinstance(form, Full)}
    wanted = "one float8 format of scale 1 beside full precision"
    for form in kinds:
        if not isinstance(form, Float8) or form.scale != 1.0 or len(kinds) > 1:
            raise _refuse("vLLM", wanted, ", ".join(sorted(map(text_of, kinds))))
    for one in layers:
        if one.k != one.v:
            got = f"{text_of(one.k)} and {text_of(one.v)} in layer {one.layer}"
            raise _refuse("vLLM", "keys and values of a layer alike (together=True)", got)
    if not kinds:
        return "--kv-cache-dtype auto"
    skipped = [str(one.layer) for one in layers if isinstance(one.k, Full)]
    (form,) = kinds
    said = f"--kv-cache-dtype fp8_{getattr(form, 'dtype', '')}"
    return said + (f" --kv-cache-dtype-skip-layers {' '.join(skipped)}" if skipped else "")


def llama_cpp(layers: Layers) -> str:
    """``-ctk q8_0 -ctv q4_0``: one type for all keys, one for all values."""
    parts = []
    for role, what in _WHAT.items():
        some = list(dict.fromkeys(_ggml("llama.cpp", layers, role)))
        if len(some) > 1:
            raise _refuse("llama.cpp", f"one type for the {what} of all layers", " and ".join(some))
        for one in layers:
            form, width = one.of(role)
            if isinstance(form, GGML) and not form.rotated and width and rotation(role, width) > 1:
                wanted = f"{what} that are rotated, as heads of {width} are"
                raise _refuse("llama.cpp", wanted, f"{text_of(form)} in layer {one.layer}")
        parts.append(f"-ct{role} {some[0]}")
    return " ".join(parts)


def ik_llama(layers: Layers) -> str:
    """``-ctk q4_0 -ctk-first q8_0,2 -ctk-last q8_0,1 ...``: a type, and others at the two ends.

    ``-khad`` and ``-vhad`` where the formats are rotated: there whole heads are.
    """
    indices = [one.layer for one in layers]
    if indices != list(range(len(layers))):
        raise _refuse("ik_llama.cpp", "every layer from the first one on", f"{indices}")
    parts = []
    for role, what in _WHAT.items():
        types = _ggml("ik_llama.cpp", layers, role)
        runs = [(name, len(list(run))) for name, run in groupby(types)]
        if len(runs) > 3:
            got = ", ".join(f"{n} x {name}" for name, n in runs)
            wanted = f"a first, a middle and a last run of layers for the {what}"
            raise _refuse("ik_llama.cpp", wanted, got)
        # Of two runs the longer one is the rule.
        middle = {1: 0, 2: int(runs[-1][1] > runs[0][1]), 3: 1}[len(runs)]
        parts.append(f"-ct{role} {runs[middle][0]}")
        for i, (name, n) in enumerate(runs):
            if i != middle:
                parts.append(f"-ct{role}-{'first' if i < middle else 'last'} {name},{n}")
        turned = [_turned(one, role) for one in layers]  # each may refuse
        if any(turned):
            parts.append(f"-{role}had")
    return " ".join(parts)


def _turned(one: LayerFormats, role: CacheRole) -> bool:
    """Whether ik_llama.cpp's rotation, of whole heads, is the one that was measured."""
    form, width = one.of(role)
    if not isinstance(form, GGML) or not form.rotated:
        return False
    if width is None:
        return True
    size = rotation(role, width)
    if size not in (1, width):
        got = f"{text_of(form)} in layer {one.layer}, by blocks of {size} of {width} channels"
        raise _refuse("ik_llama.cpp", f"{_WHAT[role]} whose whole heads are rotated", got)
    return size > 1


def _ggml(engine: str, layers: Layers, role: CacheRole) -> list[str]:
    out = []
    for one in layers:
        form, _ = one.of(role)
        if isinstance(form, Full):
            out.append("f16")
        elif isinstance(form, GGML):
            out.append(form.block)
        else:
            got = f"{text_of(form)} in layer {one.layer}"
            raise _refuse(engine, "q8_0, q5_0, q4_0 or full precision", got)
    return out


def kvtuner(layers: Layers) -> str:
    """KVTuner's YAML: ``nbits_key`` and ``nbits_value`` of each layer."""
    lines = []
    for one in layers:
        lines.append(f"{one.layer}:")
        for name, form in (("nbits_key", one.k), ("nbits_value", one.v)):
            if not isinstance(form, Quanto | HQQ | KIVI):
                got = f"{text_of(form)} in layer {one.layer}"
                raise _refuse("KVTuner", "integers of 2, 4 or 8 bits (quanto, HQQ, KIVI)", got)
            lines.append(f"  {name}: {form.nbits}")
    return "\n".join(lines) + "\n"


ENGINES = {"vllm": vllm, "llama.cpp": llama_cpp, "ik_llama.cpp": ik_llama, "kvtuner": kvtuner}
