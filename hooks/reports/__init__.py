"""What all reports share: files, digests, checks of what was read."""

from hooks.reports.base import (
    CorpusReport,
    Form,
    SavedReport,
    first_tokens,
    load_report,
    one_model,
    save_report,
    told,
)
from hooks.reports.files import TensorFile, Unsound, read_json, with_words, write_whole
from hooks.reports.notebook import MOST, Curves, percent, share
from hooks.reports.pooling import PoolingReport, prompt_axes
from hooks.reports.stats import moments, se_draws, se_moments, se_prompts
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
    "MOST", "CorpusReport", "Curves", "Form", "PoolingReport", "SavedReport", "TensorFile",
    "Unsound", "check_ascending", "check_counts", "check_numbers", "check_starts", "check_sums",
    "check_word", "first_tokens", "load_report", "moments", "one_model", "per_layer", "percent",
    "prompt_axes", "read_json", "save_report", "se_draws", "se_moments", "se_prompts", "share",
    "told", "with_words", "write_whole",
]  # fmt: skip
