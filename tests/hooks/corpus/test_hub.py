"""Ids of the Hugging Face Hub: how `datasets` is asked, and what it answers without a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hooks import probe_corpus
from tests.hooks.collapse.test_pooled import assert_equal
from tests.hooks.corpus.conftest import OPTIONS

datasets = pytest.importorskip("datasets")


def streamed(texts: list[str]) -> Any:
    def rows() -> Iterator[dict[str, Any]]:
        for number, text in enumerate(texts):
            yield {"id": number, "body": text}

    return datasets.IterableDataset.from_generator(rows)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Calls of `load_dataset`, which has the splits of "somebody/plays"."""
    calls: list[tuple[str, dict[str, Any]]] = []
    splits = {"train": texts, "test": texts[:9]}

    def load_dataset(path: str, *, streaming: bool, split: str | None) -> Any:
        calls.append((path, {"streaming": streaming, "split": split}))
        if path == "somebody/gated":
            raise datasets.exceptions.DatasetNotFoundError(
                "Dataset 'somebody/gated' is a gated dataset on the Hub. You must be authenticated"
            )
        if path == "somebody/one":
            return datasets.IterableDatasetDict({"train": streamed(texts)})
        if split is not None:
            return streamed(splits[split])
        return datasets.IterableDatasetDict({name: streamed(x) for name, x in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_split_is_streamed(
    model: Any, texts: list[str], asked: list[tuple[str, dict[str, Any]]]
) -> None:
    got = probe_corpus(model, "somebody/plays", split="test", column="body", **OPTIONS)
    assert asked == [("somebody/plays", {"streaming": True, "split": "test"})]
    assert_equal(got, probe_corpus(model, texts[:9], **OPTIONS))
    what = got.model["corpus"]["what"]
    assert (what["dataset"], what["split"], what["column"]) == ("somebody/plays", "test", "body")


def test_the_only_split_is_the_default(
    model: Any, texts: list[str], asked: list[tuple[str, dict[str, Any]]]
) -> None:
    got = probe_corpus(model, "somebody/one", **OPTIONS)
    assert_equal(got, probe_corpus(model, texts, **OPTIONS))
    with pytest.raises(ValueError, match=r"split: wanted one of \['test', 'train'\]; got None"):
        probe_corpus(model, "somebody/plays", **OPTIONS)


def test_what_the_hub_refuses_is_said(model: Any, asked: list[tuple[str, dict[str, Any]]]) -> None:
    said = (
        r"Hugging Face Hub that can be read; got 'somebody/gated': .*gated dataset.*authenticated"
    )
    with pytest.raises(ValueError, match=said):
        probe_corpus(model, "somebody/gated", **OPTIONS)


def test_an_id_without_a_network(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stubbed: `datasets` itself, told that there is no network."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = r"dataset: wanted a data set of the Hugging Face Hub that can be read; got 'nobody/none'"
    with pytest.raises(ValueError, match=said):
        probe_corpus(model, "nobody/none", **OPTIONS)
