"""The command line."""

from qkvnorm_lens.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
