"""Whole corpora: read as a stream, in any number of processes, stopped and resumed."""

from hooks.corpus.cut import check_tokenizer, text_tokens
from hooks.corpus.measured import measure_corpus
from hooks.corpus.probe import probe_corpus
from hooks.corpus.ranks import rank_and_size
from hooks.corpus.shards import merge_corpus
from hooks.corpus.stopping import Stopped

__all__ = [
    "Stopped",
    "check_tokenizer",
    "measure_corpus",
    "merge_corpus",
    "probe_corpus",
    "rank_and_size",
    "text_tokens",
]
