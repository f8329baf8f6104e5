"""A recipe as the arguments and files of what serves models; what they can't express is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from hooks.measures.cache.affine import HQQ, KIVI, Quanto
from hooks.measures.cache.formats import CacheFormat, Float8, Full, text_of
from hooks.measures.cache.ggml import GGML

Pairs = Sequence[tuple[CacheFormat, CacheFormat]]


def _refuse(engine: str, wanted: str, got: str) -> ValueError:
    return ValueError(f"recipe: wanted {wanted}, which is what {engine} has; got {got}")


def vllm(layers: Sequence[int], pairs: Pairs) -> str:
    """``--kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0 7``."""
    kinds = {form for pair in pairs for form in pair if not isinstance(form, Full)}
    wanted = "one float8 format of scale 1 beside full precision"
    for form in kinds:
        if not isinstance(form, Float8) or form.scale != 1.0 or len(kinds) > 1:
            raise _refuse("vLLM", wanted, ", ".join(sorted(map(text_of, kinds))))
    for layer, (keys, values) in zip(layers, pairs, strict=True):
        if keys != values:
            got = f"{text_of(keys)} and {text_of(values)} in layer {layer}"
            raise _refuse("vLLM", "keys and values of a layer alike (together=True)", got)
    if not kinds:
        return "--kv-cache-dtype auto"
    skipped = [str(i) for i, (k, _) in zip(layers, pairs, strict=True) if isinstance(k, Full)]
    (form,) = kinds
    said = f"--kv-cache-dtype fp8_{getattr(form, 'dtype', '')}"
    return said + (f" --kv-cache-dtype-skip-layers {' '.join(skipped)}" if skipped else "")


def llama_cpp(layers: Sequence[int], pairs: Pairs) -> str:
    """``-ctk q8_0 -ctv q4_0``: one type for all keys, one for all values."""
    parts = []
    for role, forms in zip("kv", zip(*pairs, strict=True), strict=True):
        some = list(dict.fromkeys(_ggml("llama.cpp", layers, forms)))
        if len(some) > 1:
            wanted = f"one type for the {'keys' if role == 'k' else 'values'} of all layers"
            raise _refuse("llama.cpp", wanted, " and ".join(some))
        parts.append(f"-ct{role} {some[0]}")
    return " ".join(parts)


def ik_llama(layers: Sequence[int], pairs: Pairs) -> str:
    """``-ctk q4_0 -ctk-first q8_0,2 -ctk-last q8_0,1 ...``: a type, and others at the two ends.

    ``-khad`` and ``-vhad`` where the formats are rotated.
    """
    if list(layers) != list(range(len(layers))):
        raise _refuse("ik_llama.cpp", "every layer from the first one on", f"{list(layers)}")
    parts = []
    for role, forms in zip("kv", zip(*pairs, strict=True), strict=True):
        types = _ggml("ik_llama.cpp", layers, forms)
        runs = [(name, len(list(run))) for name, run in groupby(types)]
        if len(runs) > 3:
            got = ", ".join(f"{n} x {name}" for name, n in runs)
            what = "keys" if role == "k" else "values"
            wanted = f"a first, a middle and a last run of layers for the {what}"
            raise _refuse("ik_llama.cpp", wanted, got)
        # Of two runs the longer one is the rule.
        middle = {1: 0, 2: int(runs[-1][1] > runs[0][1]), 3: 1}[len(runs)]
        parts.append(f"-ct{role} {runs[middle][0]}")
        for i, (name, n) in enumerate(runs):
            if i != middle:
                parts.append(f"-ct{role}-{'first' if i < middle else 'last'} {name},{n}")
        if any(isinstance(form, GGML) and form.rotated for form in forms):
            parts.append(f"-{role}had")
    return " ".join(parts)


def _ggml(engine: str, layers: Sequence[int], forms: Iterable[Any]) -> list[str]:
    out = []
    for layer, form in zip(layers, forms, strict=True):
        if isinstance(form, Full):
            out.append("f16")
        elif isinstance(form, GGML):
            out.append(form.block)
        else:
            got = f"{text_of(form)} in layer {layer}"
            raise _refuse(engine, "q8_0, q5_0, q4_0 or full precision", got)
    return out


def kvtuner(layers: Sequence[int], pairs: Pairs) -> str:
    """KVTuner's YAML: ``nbits_key`` and ``nbits_value`` of each layer."""
    lines = []
    for layer, pair in zip(layers, pairs, strict=True):
        lines.append(f"{layer}:")
        for name, form in zip(("nbits_key", "nbits_value"), pair, strict=True):
            if not isinstance(form, Quanto | HQQ | KIVI):
                got = f"{text_of(form)} in layer {layer}"
                raise _refuse("KVTuner", "integers of 2, 4 or 8 bits (quanto, HQQ, KIVI)", got)
            lines.append(f"  {name}: {form.nbits}")
    return "\n".join(lines) + "\n"


ENGINES = {"vllm": vllm, "llama.cpp": llama_cpp, "ik_llama.cpp": ik_llama, "kvtuner": kvtuner}
