"""``qkvnorm-lens probe``: which heads of a model lose their token at which noise."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkvnorm_lens import text
from qkvnorm_lens.arguments import at_least, brief, count, directory, number, positive, some_path
from qkvnorm_lens.cli import figures, output
from qkvnorm_lens.cli.train import check_device
from qkvnorm_lens.models import DEFAULT, Source, find, load_model

if TYPE_CHECKING:
    from hooks import CollapseReport

HELP = "find the heads and tokens whose sparse attention collapses under norm noise"
DESCRIPTION = """\
Put noise on the L2 norms of queries and keys, one layer at a time, and find the sparse attention
rows whose arg max moves: for the model, for the most fragile heads, and row by row.

MODEL is a shipped model (`qkvnorm-lens models`), a Hugging Face id such as gpt2, or a directory."""
EPILOG = """\
examples:
  qkvnorm-lens probe
  qkvnorm-lens probe gpt2 --file story.txt --out runs/gpt2
  zcat corpus.gz | qkvnorm-lens probe gpt2 --file - --prompts 64 --json > gpt2.json
  qkvnorm-lens probe --text '[12+34-N5=51'
"""
TOKENS_AT_ONCE = 1024
WINDOWS, SUMS = 8, 128
_MOST = 100_000  # sigmas, layers
_AMOUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_OPTIONS = (
    "sigmas", "on", "method", "law", "shared", "layers", "sparse", "strict", "draws", "seed",
    "keep", "engine",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT, help=f"[{DEFAULT}]")
    _reading(parser.add_argument_group("what the model reads"))
    _corpus(parser.add_argument_group("a whole corpus"))
    _noise(parser.add_argument_group("noise"))
    where = parser.add_argument_group("how it runs")
    where.add_argument("--batch-size", type=positive, metavar="N", help="prompts per forward pass")
    said = "competitors to remember, for the sigma at which 1%% collapse [524288; a corpus: 131072]"
    where.add_argument("--keep", type=positive, metavar="N", help=said)
    said = "what reduces scores [compiled on the CPU, else torch]"
    choices = ("auto", "compiled", "torch", "triton")
    where.add_argument("--engine", choices=choices, default="auto", help=said)
    where.add_argument("--device", help="cpu, cuda, cuda:1, ... [an accelerator, else cpu]")
    where.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="[as saved; else float32]"
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--fragile", type=count, default=10, metavar="N", help="heads and rows to list [10]"
    )
    said = "list heads and rows by attention that does not go to the first token"
    out.add_argument("--no-sinks", action="store_true", help=said)
    out.add_argument("--json", action="store_true", help="JSON, and nothing else, on stdout")
    said = "also write report.html, report.safetensors, frame.csv, summary.txt and three figures"
    out.add_argument("--out", type=some_path, metavar="DIR", help=said)
    figures.add_arguments(out, "png")


def _reading(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group()
    which.add_argument("--text", help="the text itself (an addition model: a sum on each line)")
    which.add_argument("--file", metavar="PATH", help="a UTF-8 file; - for standard input")
    said = "a JSON file of chat messages (role and content), written by the chat template"
    which.add_argument("--messages", metavar="PATH", help=said)
    which.add_argument(
        "--split", help="addition models: draw sums of this kind [the one it was trained on]"
    )
    said = (
        "a BOS token before each window [as the model has it, unless the text begins with "
        "one or with its chat template]"
    )
    group.add_argument("--prepend-bos", action=argparse.BooleanOptionalAction, help=said)
    said = "long text is cut into windows of N tokens [128, or the context]"
    group.add_argument("--length", type=at_least(2), metavar="N", help=said)
    said = f"at most N windows, or N sums [{WINDOWS} windows, {SUMS} sums]"
    group.add_argument("--prompts", type=positive, metavar="N", help=said)


def _corpus(group: argparse._ArgumentGroup) -> None:
    said = (
        "a file or folder of jsonl, parquet, csv or text (also .gz, .bz2, .xz, .zst), or an id of "
        "the Hugging Face Hub, read as a stream; --split names a split of the latter"
    )
    group.add_argument("--dataset", metavar="X", help=said)
    said = "the column with the text [text, or the only one of text]"
    group.add_argument("--column", metavar="NAME", help=said)
    said = "documents are cut into windows of N tokens [the context, at most 1024]"
    group.add_argument("--context", type=at_least(2), metavar="N", help=said)
    said = "put several documents into one window, kept apart by positions and mask"
    group.add_argument("--pack", action="store_true", default=None, help=said)
    said = "end after N tokens, as 200000, 200k or 1M [the end of the data set]"
    group.add_argument("--tokens", type=amount, metavar="N", help=said)
    said = "end when the standard error of the sigma at 1%% is below E percentage points"
    points = number("percentage points above 0", lambda x: 0 < x < math.inf)
    group.add_argument("--until", type=points, metavar="E", help=said)
    said = "count one part of n, i from 1; `qkvnorm-lens merge` puts them together"
    group.add_argument("--shard", type=shard, metavar="I/N", help=said)


def amount(value: str) -> int:
    """``200000``, ``200k``, ``1M``: a number of tokens."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbB]?)", value.strip())
    size = round(float(found[1]) * _AMOUNTS[found[2].lower()]) if found else 0
    if not 1 <= size < 1 << 53:
        raise argparse.ArgumentTypeError(
            f"wanted a number of tokens, as 200000, 200k or 1M; got {brief(value)}"
        )
    return size


def shard(value: str) -> tuple[int, int]:
    """``2/7``: a part and their number."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"wanted i/n with i from 1 to n; got {brief(value)}")
    return int(found[1]), int(found[2])


def _noise(group: argparse._ArgumentGroup) -> None:
    said = (
        "RMS of the relative change, as 0.01,0.05 or 1%%,5%% or start:stop:count [16 from 1%% "
        "to 50%%]"
    )
    group.add_argument("--sigmas", type=sigmas, metavar="LIST", help=said)
    group.add_argument("--on", type=roles, default="qk", help="any of q, k, v [qk]")
    group.add_argument(
        "--law", choices=("uniform", "gaussian", "lognormal"), default="uniform", help="[uniform]"
    )
    said = "which vectors share a factor in sampled rates [none]"
    group.add_argument(
        "--shared", choices=("none", "heads", "kv", "token"), default="none", help=said
    )
    said = "collapse computed, or counted over draws [exact]"
    group.add_argument("--method", choices=("exact", "sample"), default="exact", help=said)
    said = "samples; with --method exact only to check the strict rate [0, or 16 to sample]"
    group.add_argument("--draws", type=count, metavar="N", help=said)
    said = "skip the strict rate, or count it over --draws"
    group.add_argument("--no-strict", dest="strict", action="store_false", help=said)
    group.add_argument("--layers", type=layers, metavar="LIST", help="as 0,3,5-7 [all]")
    group.add_argument(
        "--sparse",
        type=number("a maximum in (0, 1]", lambda a: 0 < a <= 1),
        default=0.95,
        metavar="A",
        help="least maximum of a sparse row [0.95]",
    )
    group.add_argument(
        "--seed", type=count, default=0, metavar="N", help="of the noise, and of drawn sums [0]"
    )


def sigmas(value: str) -> list[float]:
    """``0.01,0.05``, ``1%,5%`` or ``start:stop:count`` (evenly spaced, both ends included)."""
    try:
        if ":" not in value:
            return [_share(part) for part in value.split(",")]
        start, stop, number = value.split(":")
        low, high, steps = _share(start), _share(stop), int(number)
        if not 2 <= steps <= _MOST:
            raise ValueError
        return [low + (high - low) * i / (steps - 1) for i in range(steps)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"wanted numbers >= 0 as 0.01,0.05 or 1%,5% or start:stop:count; got {brief(value)}"
        ) from None


def _share(value: str) -> float:
    value = value.strip()
    share = float(value[:-1]) / 100 if value.endswith("%") else float(value)
    if not 0 <= share < math.inf:
        raise ValueError
    return share


def roles(value: str) -> str:
    """Some of q, k and v, each once."""
    if not value or set(value) - set("qkv") or len(set(value)) < len(value):
        raise argparse.ArgumentTypeError(f"wanted some of q, k, v, each once; got {brief(value)}")
    return value


def layers(value: str) -> list[int]:
    """``0,3,5-7``: block indices, ranges with both ends."""
    try:
        picked: list[int] = []
        for part in value.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span or span[-1] > _MOST:
                raise ValueError
            picked += span
        return picked
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"wanted block indices as 0,3,5-7; got {brief(value)}"
        ) from None


def run(args: argparse.Namespace) -> str:
    """Load, probe, write; returns what goes to standard output."""
    source = find(args.model)  # what can fail early fails before torch is imported
    if args.out is not None:
        directory("--out", args.out)
    figures.check(args)
    _check_corpus(args)
    if args.method == "sample" and args.draws is not None and args.draws < 2:
        raise ValueError(f"--draws: wanted 2 or more with --method sample; got {args.draws}")
    given = read(args)
    with _folder(args.out):
        return _run(args, source, given)


def _check_corpus(args: argparse.Namespace) -> None:
    """Refuse options that belong to a corpus without one, and others beside it."""
    if args.dataset is None:
        for name in ("column", "context", "pack", "tokens", "until", "shard"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: wanted it with --dataset; got it without")
        return
    for name in ("text", "file", "messages", "length", "prompts"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: wanted it without --dataset; got both")
    if args.shard is not None and args.out is None:
        raise ValueError("--out: wanted a directory for the shard; got none")


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[None]:
    """The directory ``--out``, made early, and removed again if only a lock comes into it."""
    if out is None:
        yield
        return
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wanted = "--out: wanted a directory that can be made"
        raise ValueError(f"{wanted}; got {brief(str(out))}: {error.strerror}") from error
    try:
        yield
    finally:
        left = [*out.iterdir()] if new else []
        if new and all(path.suffix == ".lock" for path in left):
            for path in left:
                path.unlink()
            out.rmdir()


def _run(args: argparse.Namespace, source: Source, given: str | None) -> str:
    if sys.stderr.isatty():
        output.say(f"loading {args.model}")
    device, dtype = _where(args)
    _check(args)
    model = load_model(args.model, device=device, dtype=dtype)
    if args.dataset is not None:
        return _of_corpus(args, model)
    prompts = choose(args, source, model, given)
    if prompts.left_out:
        output.say(f"{prompts.left_out}: --prompts takes more")
    return output.shown(args, probe(args, model, prompts), prompts)


def read(args: argparse.Namespace) -> str | None:
    """The text that the user gave, or None.

    Raises:
        ValueError: not a text file, or ``--text`` with the name of one.
        OSError: no such file.
    """
    if args.text is not None:
        if len(args.text) < 256 and "\0" not in args.text and os.path.isfile(args.text):
            raise ValueError(
                f"--text: wanted the text itself; got the name of a file, which --file {args.text} "
                "reads"
            )
        return _some(str(args.text), "--text")
    option, name = ("--messages", args.messages) if args.messages else ("--file", args.file)
    if name is None:
        return None
    wanted = f"{option}: wanted a file of UTF-8 text"
    try:
        if name == "-":
            return _some(sys.stdin.read(), option)
        return _some(Path(name).read_text(encoding="utf-8"), option)
    except UnicodeDecodeError as error:
        raise ValueError(f"{wanted}; got {brief(name)}: {error}") from error
    except OSError as error:
        raise ValueError(f"{wanted}; got {brief(name)}: {error.strerror}") from error


def _some(given: str, option: str) -> str:
    if not given.strip():
        raise ValueError(f"{option}: wanted some text; got an empty one")
    return given


def _check(args: argparse.Namespace) -> None:
    """What the library would refuse once the model is loaded."""
    from hooks.collapse import read_grid

    read_grid(args.sigmas, args.law)
    if args.split is not None and args.dataset is None:
        from qkvnorm_lens.training import get_split

        get_split(args.split)


def _where(args: argparse.Namespace) -> tuple[str | None, Any]:
    """Device and dtype, tried before anything is loaded."""
    import torch

    local = os.environ.get("LOCAL_RANK", "")
    if args.device is None and local.isdigit() and torch.cuda.is_available():
        args.device = f"cuda:{int(local) % torch.cuda.device_count()}"  # one for each process
    if args.device is not None:
        check_device(args.device)
    return args.device, None if args.dtype is None else getattr(torch, args.dtype)


def choose(args: argparse.Namespace, source: Source, model: Any, given: str | None) -> text.Prompts:
    """What this model reads: sums for an addition model, windows of a text for others.

    Raises:
        ValueError: text that does not fit the model, or options that do not.
    """
    from qkvnorm_lens.training import adds_integers, trained_on

    if not adds_integers(model):
        if args.split is not None:
            raise ValueError(f"--split: wanted an addition model; got {brief(args.model)}")
        if args.messages is not None:
            return _messages(args, model, str(given))
        passage = text.passage() if given is None else given
        how = {"length": args.length, "prepend_bos": args.prepend_bos}
        cut = text.windows(model, passage, limit=args.prompts or WINDOWS, **how)
        if given is not None:
            return cut
        built_in = f"{cut.source} of the built-in passage (Pride and Prejudice, chapter 1)"
        return text.Prompts(cut.ids, built_in, cut.left_out)
    for option, value in (("--messages", args.messages), ("--prepend-bos", args.prepend_bos)):
        if value is not None:
            raise ValueError(f"{option}: wanted a model of language; got {brief(args.model)}")
    if args.length is not None:
        raise ValueError(
            f"--length: wanted none, as sums are not cut (--prompts, --split); got {args.length}"
        )
    if given is not None:
        return text.lines(model, given, limit=args.prompts or SUMS)
    split = args.split or trained_on(source)
    if split is None:
        raise ValueError(
            "--split: wanted one, such as small-train, or --text, as no card.json says which sums "
            f"{args.model} was trained on; got none"
        )
    return text.sums(split, args.prompts or SUMS, seed=args.seed)


def _messages(args: argparse.Namespace, model: Any, given: str) -> text.Prompts:
    for option, value in (("--length", args.length), ("--prepend-bos", args.prepend_bos)):
        if value is not None:
            raise ValueError(f"{option}: wanted none beside --messages; got {value}")
    try:
        messages = json.loads(given)
    except ValueError as error:
        raise ValueError(f"--messages: wanted a file of JSON; got {error}") from error
    return text.conversations(model, messages, limit=args.prompts or WINDOWS)


def probe(args: argparse.Namespace, model: Any, prompts: text.Prompts) -> CollapseReport:
    """Run :func:`hooks.collapse_probe` with the options.

    Raises:
        ValueError: whatever the library refuses, or too little memory.
    """
    import torch

    import hooks

    longest = max(map(len, prompts.ids))
    batch_size = args.batch_size or max(1, TOKENS_AT_ONCE // longest)
    options = _given(args)
    try:
        return hooks.collapse_probe(model, prompts.ids, batch_size=batch_size, **options)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            "--batch-size: wanted a smaller one, or a smaller --length or --dtype; got out of "
            f"memory with {batch_size} prompts of {longest} tokens at once"
        ) from error


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The library's options, but those that are left to it."""
    given = {name: getattr(args, name) for name in _OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def _of_corpus(args: argparse.Namespace, model: Any) -> str:
    """Probe a whole data set; of a shard, say how it goes on."""
    import hooks

    context = args.context or min(1024, int(getattr(model.cfg, "n_ctx", 0) or 1024))
    options = _given(args)
    report = hooks.probe_corpus(
        model,
        args.dataset,
        split=args.split,
        column=args.column,
        context=args.context,
        tokens=args.tokens,
        until=args.until,
        prepend_bos=args.prepend_bos,
        pack=bool(args.pack),
        out=args.out,
        shard=args.shard,
        batch_size=args.batch_size or max(1, TOKENS_AT_ONCE // context),
        **options,
    )
    if args.shard is not None:
        part, of = args.shard
        return (
            f"Shard {part} of {of} is whole: {report.n_tokens} tokens. When all are:\n"
            f"qkvnorm-lens merge {args.out}"
        )
    return output.shown(args, report, output.read_of(report), first=output.is_first())
