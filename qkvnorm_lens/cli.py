"""The command line: ``qkvnorm-lens probe``, ``report``, ``models``, ``train``, ``experiment``.

A command is a module with ``add_arguments(parser)`` and ``run(args) -> str``; what it returns is
all that goes to standard output. Heavy imports belong into ``run``: ``--help`` must be quick.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

from qkvnorm_lens import __version__, _experiment, _models, _probe, _report, _train

PROG = "qkvnorm-lens"
_COMMANDS = {
    "probe": _probe,
    "report": _report,
    "models": _models,
    "train": _train,
    "experiment": _experiment,
}
_SIGINT = 2


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="How much of what an attention head does hangs on the length of its vectors?",
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument(
            "--traceback", action="store_true", help="on an error, show where it came from"
        )
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 1: an error that has a message (standard error; nothing on standard output).
    2: wrong usage. 130: interrupted. 143: terminated, where that is caught.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # argparse, after --help or a usage error
        return stop.code if isinstance(stop.code, int) else 2
    try:
        with contextlib.redirect_stdout(sys.stderr):  # third parties print
            answer = args.run(args)
        _answer(answer)
    except KeyboardInterrupt as stop:
        print(f"{PROG}: {_one_line(stop) if stop.args else 'interrupted'}", file=sys.stderr)
        return 128 + getattr(stop, "signal", _SIGINT)  # as shells have it
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"{PROG}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _answer(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a token may be any character
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
