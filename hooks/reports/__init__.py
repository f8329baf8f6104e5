"""What every report shares: files, digests, checks of what was read."""

from hooks.reports.base import Form, check_follows, first_tokens, joined_facts, told
from hooks.reports.files import TensorFile, Unsound, read_json, with_words, write_whole
from hooks.reports.values import (
    check_ascending,
    check_counts,
    check_numbers,
    check_starts,
    check_sums,
    check_word,
    per_layer,
)

__all__ = [
    "Form",
    "TensorFile",
    "Unsound",
    "check_ascending",
    "check_counts",
    "check_follows",
    "check_numbers",
    "check_starts",
    "check_sums",
    "check_word",
    "first_tokens",
    "joined_facts",
    "per_layer",
    "read_json",
    "told",
    "with_words",
    "write_whole",
]
