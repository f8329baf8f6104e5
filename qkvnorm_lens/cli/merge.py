"""``qkvnorm-lens merge``: the report of a corpus from the parts of its shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from qkvnorm_lens.arguments import count, directory, some_path
from qkvnorm_lens.cli import figures, output

HELP = "put the shards of a corpus together"
DESCRIPTION = """\
Merge the parts that `qkvnorm-lens probe --dataset X --shard I/N --out DIR` wrote into one report:
the one that a single process would have written. What is missing or there twice is named. Parts
of hooks.measure_corpus (sweep, spread, interference) give a report, a table and a summary."""
EPILOG = """\
examples:
  qkvnorm-lens merge runs/corpus
  qkvnorm-lens merge node1/corpus node2/corpus --out runs/whole
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folders", nargs="+", type=some_path, metavar="DIR", help="with parts")
    said = "heads and rows to list [10]"
    parser.add_argument("--fragile", type=count, default=10, metavar="N", help=said)
    said = "list heads and rows by attention that does not go to the first token"
    parser.add_argument("--no-sinks", action="store_true", help=said)
    parser.add_argument("--json", action="store_true", help="JSON, and nothing else, on stdout")
    figures.add_arguments(parser, "png")
    said = "for report.html, report.safetensors, frame.csv, ... [the first DIR]"
    parser.add_argument("--out", type=some_path, metavar="DIR", help=said)


def run(args: argparse.Namespace) -> str:
    """Merge, write; returns what goes to standard output."""
    import hooks

    for folder in args.folders:
        directory("DIR", folder)
    report = hooks.merge_corpus(args.folders)
    args.out = args.out or Path(args.folders[0])
    args.out.mkdir(parents=True, exist_ok=True)
    if not isinstance(report, hooks.CollapseReport):
        return output.table_of(args.out, report, as_json=args.json)
    return output.shown(args, report, output.read_of(report))
