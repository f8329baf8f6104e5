"""What all reports share: files, digests, checks of what was read."""

from hooks.reports.base import CorpusReport, Form, SavedReport, first_tokens, told
from hooks.reports.files import TensorFile, Unsound, read_json, with_words, write_whole
from hooks.reports.notebook import MOST, Curves, percent, share
from hooks.reports.stats import se_draws, se_prompts
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
    "MOST", "CorpusReport", "Curves", "Form", "SavedReport", "TensorFile", "Unsound",
    "check_ascending", "check_counts", "check_numbers", "check_starts", "check_sums", "check_word",
    "first_tokens", "per_layer", "percent", "read_json", "se_draws", "se_prompts", "share",
    "told", "with_words", "write_whole",
]  # fmt: skip
