"""The command line: ``qkvnorm-lens probe``, ``merge``, ``report``, ``train``, ``experiment``, ...

A command is a module with ``add_arguments(parser)`` and ``run(args) -> str``; what it returns is
all that goes to standard output. Heavy imports belong into ``run``: ``--help`` must be quick.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from qkvnorm_lens import __version__
from qkvnorm_lens.arguments import brief, near
from qkvnorm_lens.cli import cache, experiment, merge, models, probe, report, train

PROG = "qkvnorm-lens"
COMMANDS = {
    "probe": probe,
    "cache": cache,
    "merge": merge,
    "report": report,
    "models": models,
    "train": train,
    "experiment": experiment,
}
_SIGINT = 2


class _Parser(argparse.ArgumentParser):
    """Reports errors on one line, ``name: wanted X; got Y``, with what may have been meant.

    Prefixes of options are not accepted: a later version's options could change their meaning.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """One line on standard error; the exit code is 2."""
        self.exit(2, f"{PROG}: error: {' '.join(_as_wanted(message).split())}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but report unknown options apart from surplus arguments."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word, command = unknown[0].partition("=")[0], getattr(found, "command", PROG)
            if not word.startswith("-"):
                self.error(f"{brief(word)}: wanted no further argument of {command}; got one")
            said = near(word, getattr(found, "names", {}).values())
            self.error(f"{word[:100]}: wanted an option of {command}; got an unknown one{said}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            wanted, got = ", ".join(known), f"{brief(value)}{near(str(value), known)}"
            raise argparse.ArgumentError(action, f"wanted one of {wanted}; got {got}")


_ARGPARSE: Final = (  # what argparse says, and what we do
    (r"argument (.+?): expected .*argument.*", r"\1: wanted a value; got none"),
    (r"argument (.+?): not allowed with argument (.+)", r"\1: wanted it without \2; got both"),
    (r"argument (.+?): ignored explicit argument (.+)", r"\1: wanted no value; got \2"),
    (r"the following arguments are required: (.+)", r"\1: wanted a value; got none"),
    (r"argument (.+?): (.*)", r"\1: \2"),
)


def _as_wanted(message: str) -> str:
    for theirs, ours in _ARGPARSE:
        if re.fullmatch(theirs, message, re.S):
            return re.sub(theirs, ours, message, count=1, flags=re.S)
    return message


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = _Parser(
        prog=PROG,
        description="How much of what an attention head does depends on the length of its vectors?",
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
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
        names = {
            a.dest: a.option_strings[-1] if a.option_strings else str(a.metavar)
            for a in command._actions
        }
        command.set_defaults(run=module.run, command=name, names=names)
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
    except (ValueError, TypeError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"{PROG}: error: {_named(error, args.names)}", file=sys.stderr)
        return 1
    return 0


def _answer(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a token may be any character
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text, flush=True)


def _named(error: BaseException, names: Mapping[str, str]) -> str:
    """The message with an argument's name as on the command line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: wanted a file or directory to use; got {error.strerror}"
    message = _one_line(error)
    name, colon, rest = message.partition(": ")
    return f"{names[name]}{colon}{rest}" if name in names else message


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
