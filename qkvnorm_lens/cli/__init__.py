"""The command line."""

from qkvnorm_lens.cli.main import main

__all__ = [
    "main",
]
