"""``qkvnorm-lens cache``: which layers bear a quantised cache, and a recipe under a budget."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from qkvnorm_lens.arguments import at_least, count, directory, number, some_path
from qkvnorm_lens.cli import probe
from qkvnorm_lens.models import DEFAULT
from qkvnorm_lens.tables import table

if TYPE_CHECKING:
    from hooks import CacheRecipe, CacheRisk

HELP = "what a quantised key/value cache costs, and a format for each layer"
DESCRIPTION = """\
Measure what each format of a key/value cache costs a model, layer by layer, in nats per token, and
choose a format for each layer's keys and values under a budget of bits."""
EPILOG = """\
examples:
  qkvnorm-lens cache gpt2 --bits 4.5 --out runs/cache
  qkvnorm-lens cache path/to/a/model --file text.txt --formats fp8-e4m3,full --together --bits 9
"""


NO_ENGINE = """\
No engine that we know takes this mixture; `recipe.cache()` does, in transformers. For vLLM:
--formats fp8-e4m3,full --together --bits 9. llama.cpp has one type for all layers: --formats q8_0,
say."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    said = f"a shipped model, a directory or a Hugging Face id [{DEFAULT}]"
    parser.add_argument("model", nargs="?", default=DEFAULT, metavar="MODEL", help=said)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="TEXT", help="calibrate on this text")
    text.add_argument("--file", metavar="PATH", help="calibrate on a text file; -: standard input")
    said = "tokens of a window [128, or the context]"
    parser.add_argument("--length", type=at_least(2), metavar="N", help=said)
    parser.add_argument("--prompts", type=at_least(1), metavar="N", help="at most N [8 windows]")
    bits = number("bits above 0", lambda x: 0 < x < math.inf)
    said = "most bits per stored number, scales included [4.5]"
    parser.add_argument("--bits", type=bits, default=4.5, metavar="B", help=said)
    said = "formats to measure and to choose from, as q8_0,q4_0,full [all that fit]"
    parser.add_argument("--formats", metavar="LIST", help=said)
    said = "keys and values of a layer in one format, as vLLM needs it"
    parser.add_argument("--together", action="store_true", help=said)
    said = "random gradients, a backward pass each, at least 1 [2]"
    parser.add_argument("--samples", type=at_least(1), default=2, metavar="N", help=said)
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="of the draws [0]")
    said = "for report.html, report.safetensors, frame.csv, recipe.json and the engines' arguments"
    parser.add_argument("--out", type=some_path, metavar="DIR", help=said)


def run(args: argparse.Namespace) -> str:
    """Load, measure, choose, write; returns what goes to standard output."""
    if args.out is not None:
        directory("--out", args.out)
    given = probe.read(argparse.Namespace(**vars(args), messages=None))
    from hooks import cache_risk
    from qkvnorm_lens.models import find, load_model

    source = find(args.model)
    formats = None if args.formats is None else args.formats.split(",")
    model = load_model(args.model)
    also = {"split": None, "messages": None, "prepend_bos": None}
    prompts = probe.choose(argparse.Namespace(**vars(args), **also), source, model, given)
    measured = None if formats is None else [name for name in formats if name != "full"]
    report = cache_risk(model, prompts.ids, formats=measured, samples=args.samples, seed=args.seed)
    recipe = report.recipe(args.bits, formats=formats, together=args.together)
    said = f"{report.summary()}\nRead: {prompts.source}.\n\n{rates(report)}\n\n{recipe}"
    if not any(fits for fits, _ in engines(recipe).values()):
        said += f"\n\n{NO_ENGINE}"
    if args.out is not None:
        write(args, report, recipe, prompts.source)
        said += f"\n\nThis and more, to open in a browser: {args.out / 'report.html'}"
    return said


def rates(report: CacheRisk) -> str:
    """A line for each format, over the whole model."""
    frame = report.to_frame("model").sort_values("risk")
    head = ["format", "bits", "nats", "of keys", "of values", "rows moved"]
    rows = [
        [
            str(r["format"]),
            f"{(r['bits_k'] + r['bits_v']) / 2:g}",
            *(f"{r[name]:.2g}" for name in ("risk", "risk_k", "risk_v")),
            "-" if math.isnan(r["moved"]) else f"{100 * r['moved']:.2g}%",
        ]
        for r in frame.to_dict("records")
    ]
    return table(head, rows)


def write(args: argparse.Namespace, report: CacheRisk, recipe: CacheRecipe, source: str) -> None:
    """Report, page, frame, recipe, and what each engine can be told of it."""
    from qkvnorm_lens.page import cache_page

    args.out.mkdir(parents=True, exist_ok=True)
    report.save(args.out / "report.safetensors")
    report.to_frame().to_csv(args.out / "frame.csv", index=False)
    recipe.save(args.out / "recipe.json")
    found = engines(recipe)
    told = {engine: said for engine, (_, said) in found.items()}
    lines = [f"{engine}: {said}" for engine, said in told.items()]
    (args.out / "engines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    advice = "" if any(fits for fits, _ in found.values()) else NO_ENGINE
    page = cache_page(report, recipe, told, source=source, advice=advice)
    (args.out / "report.html").write_text(page, encoding="utf-8")


def engines(recipe: CacheRecipe) -> dict[str, tuple[bool, str]]:
    """Whether each engine can express the recipe, and what it is told, or why it can't be."""
    from hooks.measures.cache import ENGINES

    out = {}
    for engine in ENGINES:
        try:
            out[engine] = True, recipe.export(engine).strip()
        except ValueError as error:
            out[engine] = False, f"can't express it: {error}"
    return out
