"""The command line."""

from qkvnorm_lens.cli.command import build_parser, main

__all__ = ["build_parser", "main"]
