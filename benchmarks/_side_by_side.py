"""What the benchmarks share: interleaved timing, peaks by process, tables, the models.

Everything that is compared runs in one process, turn and turn about, so that a machine that slows
down slows all of it; a ratio is taken within each turn and its median and quartiles are given.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# transformers draws a bar for every model it loads
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
MIB = 2**20
Row = dict[str, Any]


# -- time -------------------------------------------------------------------------------------


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    lines: Mapping[str, Callable[[], object]], repeats: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each line in each repeat; one round before them is to warm up.

    ``"cpu"`` counts all threads' processor time: for a machine that is busy with other things,
    where it flatters what runs on one thread.

    Every repeat begins with another line, so that none always follows the same one.
    """
    import torch

    names, seconds = list(lines), {name: list[float]() for name in lines}
    with torch.no_grad():
        for repeat in range(repeats + 1):
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                gc.collect()
                began = CLOCKS[clock]()
                lines[name]()
                if repeat:
                    seconds[name].append(CLOCKS[clock]() - began)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and both quartiles."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def ratio_row(name: str, seconds: Sequence[float], base: Sequence[float]) -> Row:
    """One line of a table: time and the ratio to the base within each repeat."""
    middle, low, high = spread(seconds)
    ratio, ratio_low, ratio_high = spread([a / b for a, b in zip(seconds, base, strict=True)])
    return {
        "what": name,
        "median s": middle,
        "IQR s": high - low,
        "ratio": ratio,
        "ratio IQR": ratio_high - ratio_low,
    }


# -- memory -----------------------------------------------------------------------------------


def peak_mib() -> float:
    """Most resident memory that this process ever had, MiB.

    Linux: the program's own mark. `ru_maxrss` would begin at what the parent held when it started
    this process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1024 if sys.platform != "darwin" else most / MIB


def child(module: str, *arguments: object, timeout: float = 1200.0) -> Row:
    """What a process of its own prints as its last line, which is JSON; or why it failed."""
    # A fixed threshold: else glibc keeps what was freed, and a peak tells of its past.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {timeout:.0f} s"}
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"failed": f"exit {done.returncode}: {words[0][:200]}"}
    result: Row = json.loads(done.stdout.splitlines()[-1])
    return result


# -- words ------------------------------------------------------------------------------------


def machine() -> Row:
    """What the numbers depend on: processor, cores, threads, versions. No names of hosts."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("torch", "transformer-lens", "transformers", "numpy", "numba", "nnsight", "pyvene")
    return {
        "processor": processor,
        "cores": cores,
        "torch threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
        "load at the start": round(os.getloadavg()[0], 2),
    }


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def shown(value: object) -> str:
    """A number as a table shows it: three significant digits."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "-" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}" if abs(value) >= 1e-4 or not value else f"{value:.1e}"


def columns(rows: Sequence[Row]) -> list[str]:
    """Every name that a row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def print_table(rows: Sequence[Row]) -> None:
    names = columns(rows)
    lines = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *cells]), flush=True)


def markdown_table(rows: Sequence[Row]) -> str:
    names = columns(rows)
    lines = [names, ["---"] * len(names)]
    lines += [[shown(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path | None, values: object) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


# -- models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model on some tokens: its bridge, and the same weights without TransformerLens."""

    name: str
    bridge: Any
    bare: Any
    tokens: Any  # [batch, pos]

    def logits(self) -> Any:
        """Of the bare model."""
        if hasattr(self.bare, "transformer") or hasattr(self.bare, "model"):
            return self.bare(self.tokens, use_cache=False).logits
        return self.bare(self.tokens)


def gpt2_shape(batch: int, pos: int, **sizes: int) -> Case:
    """GPT-2 small with random weights, queries and keys enlarged so that sparse rows exist."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(attn_implementation="eager", **sizes)
    torch.manual_seed(0)
    inner = GPT2LMHeadModel(config)
    with torch.no_grad():
        for block in inner.transformer.h:
            block.attn.c_attn.weight *= 8
    tokens = torch.randint(config.vocab_size, (batch, pos))
    return _case("GPT-2 small shape, random", inner, tokens)


def smollm2(batch: int, pos: int) -> Case:
    """SmolLM2-135M-Instruct, its real weights, on English prose."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.support.models import shakespeare
    from tests.support.real_models import smollm2_path

    if not smollm2_path().exists():
        raise SystemExit("SmolLM2: wanted the model that `make real-model` builds")
    inner = AutoModelForCausalLM.from_pretrained(
        smollm2_path(), attn_implementation="eager", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    texts = shakespeare() if batch > 1 else ["\n\n\n".join(shakespeare())]
    rows = [tokenizer(text)["input_ids"][:pos] for text in texts[:batch]]
    if len(rows) != batch or any(len(row) != pos for row in rows):
        raise ValueError(f"text: wanted {batch} x {pos} tokens; got {[len(r) for r in rows]}")
    return _case("SmolLM2-135M", inner, torch.tensor(rows), tokenizer)


def _case(name: str, inner: Any, tokens: Any, tokenizer: Any = None) -> Case:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bare = copy.deepcopy(inner).eval()  # building a bridge changes the model in place
    kind = type(inner).__name__
    inner.config.architectures = [kind]
    bridge = build_bridge_from_module(
        inner, kind, hf_config=inner.config, tokenizer=tokenizer
    ).eval()
    return Case(name, bridge, bare, tokens)


def addition(batch: int, pos: int) -> Case:
    """The shipped `addition-pre` on sums of one length."""
    from qkvnorm_lens import load_checkpoint, to_plain
    from qkvnorm_lens.training import PAD, Split, draw

    bridge = load_checkpoint("addition-pre").eval()
    drawn = draw(Split(counts=(4,), digits=(2,)), 64 * batch, seed=0).tokens[:, :pos]
    whole = drawn[(drawn != PAD).all(1)][:batch]
    if whole.shape != (batch, pos):
        raise ValueError(f"sums: wanted {batch} of {pos} tokens or more; got {len(whole)}")
    return Case("addition-pre, shipped", bridge, to_plain(bridge).eval(), whole)


def own(batch: int, pos: int, attn: str = "sdpa") -> Case:
    """Two layers of our own, d_head 64; queries and keys enlarged so that sparse rows exist."""
    import torch

    from qkvnorm_lens import QKVNormConfig, QKVNormTransformer, to_bridge

    sizes = {"d_model": 256, "d_head": 64, "n_heads": 4, "n_layers": 2, "d_mlp": 1024}
    config = QKVNormConfig(
        placement="pre", attn_implementation=attn, n_ctx=pos, d_vocab=512, seed=0,
        positional_embedding_type="rotary", **sizes,
    )  # fmt: skip
    plain = QKVNormTransformer(config).eval()
    with torch.no_grad():
        for layer in plain.layers:
            for project in (layer.attn.q, layer.attn.k):
                project.weight *= 8
    bare = copy.deepcopy(plain)
    torch.manual_seed(0)
    tokens = torch.randint(512, (batch, pos))
    return Case(f"own, two layers, {attn}", to_bridge(plain).eval(), bare, tokens)


CASES: dict[str, Callable[[int, int], Case]] = {
    "gpt2": gpt2_shape,
    "smollm2": smollm2,
    "addition": addition,
    "own": own,
}


@contextlib.contextmanager
def optional(package: str) -> Iterator[None]:
    """A tool to compare with that may be missing: nothing of it is needed by the rest."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise
