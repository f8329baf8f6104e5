"""Corpora: the same sums however they are read, stopped, resumed and spread."""

from __future__ import annotations

import copy
import gzip
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hooks
from hooks import CollapseReport, merge_corpus, probe_corpus
from hooks.collapse import pooled
from hooks.corpus import Stopped, cut, rank_and_size
from hooks.model import ModelInput
from tests.hooks.collapse.test_pooled import assert_equal
from tests.hooks.corpus.conftest import OPTIONS
from tests.support import models
from tests.support.watching import shape_checks_off


def windows(model: Any, texts: list[str], context: int) -> list[list[int]]:
    """Every character of every text, a BOS before each window."""
    bos, out = model.tokenizer.bos_token_id, []
    for text in texts:
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
        parts = [ids[at : at + context - 1] for at in range(0, len(ids), context - 1)]
        out += [[bos, *part] for part in parts]
    return out


def test_a_corpus_is_the_probe_of_its_windows(
    model: Any, texts: list[str], whole: CollapseReport
) -> None:
    rows = windows(model, texts, 24)
    once = hooks.collapse_probe(model, rows, sigmas=OPTIONS["sigmas"], progress=False)
    assert len(whole.tokens) == len(rows)
    assert whole.n_tokens == sum(map(len, rows))
    for by in ("head", "model"):
        # Batches of another make round differently.
        pd.testing.assert_frame_equal(whole.to_frame(by), once.to_frame(by), rtol=1e-4, atol=1e-6)
    assert whole.sigma_at(0.05) == pytest.approx(once.sigma_at(0.05), rel=1e-5)
    assert whole.model["corpus"]["done"]["documents"] == len(texts)
    empty = sum(not text.strip() for text in texts)
    assert f"{empty} empty documents left out" in whole.summary()


def test_short_documents_share_passes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give what each gives alone."""
    texts = ["a word or two of it"[: 3 + i % 16] for i in range(60)]
    run, ran = ModelInput.run, list[int]()

    def noted(self: ModelInput, model: Any) -> Any:
        ran.append(self.batch)
        return run(self, model)

    monkeypatch.setattr(ModelInput, "run", noted)
    together = probe_corpus(model, texts, **OPTIONS)
    ran.clear()
    again = probe_corpus(model, texts, **OPTIONS)
    assert_equal(together, again)
    assert len(ran) < 16  # lengths; three passes are a trial
    ran.clear()
    alone = probe_corpus(model, texts, batch_size=1, **OPTIONS)
    assert len(ran) >= len(texts)
    for by in ("head", "model"):
        pd.testing.assert_frame_equal(together.to_frame(by), alone.to_frame(by), rtol=1e-4)
    assert together.n_tokens == alone.n_tokens


def test_a_window_of_one_token_is_left_out_and_counted(model: Any) -> None:
    report = probe_corpus(model, ["x", "many words", "y"], prepend_bos=False, **OPTIONS)
    assert len(report.tokens) == 1
    assert "2 windows of one token left out" in report.summary()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv", "dataset", "folder"])
def test_every_kind_of_file_is_read_alike(
    model: Any, texts: list[str], whole: CollapseReport, kind: str, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    frame = pd.DataFrame({"id": range(len(texts)), "words": texts})
    path: Any = tmp_path / f"corpus.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in frame.to_dict("records"))
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "csv":
        path, texts = tmp_path / "corpus.csv", [text or " " for text in texts]
        frame.assign(words=texts).to_csv(path, index=False)
    elif kind == "folder":
        path.mkdir()
        rows = lines.splitlines(keepends=True)
        (path / "a.jsonl").write_text("".join(rows[:9]))
        (path / "b.jsonl").write_text("".join(rows[9:]))
    else:
        path = datasets.Dataset.from_pandas(frame)
    got = probe_corpus(model, path, column="words", **OPTIONS)
    assert_equal(got, whole)


def test_a_text_file_is_read_in_whole_paragraphs(model: Any, tmp_path: Path) -> None:
    paragraphs = [text[:60] for text in models.shakespeare()]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    got = probe_corpus(model, str(path), **OPTIONS)
    assert_equal(got, probe_corpus(model, ["\n\n".join(paragraphs)], **OPTIONS))


def test_the_order_of_the_documents_does_not_matter(
    model: Any, texts: list[str], whole: CollapseReport
) -> None:
    turned = probe_corpus(model, texts[::-1], **OPTIONS)
    # Batches of another make round differently.
    for by in ("head", "model"):
        pd.testing.assert_frame_equal(whole.to_frame(by), turned.to_frame(by), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        np.sort(turned.table.half_width), np.sort(whole.table.half_width), rtol=1e-3
    )


def test_a_report_does_not_grow(
    model: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the corpus: the same arrays, no more rows and tokens than asked for."""
    monkeypatch.setattr(pooled, "SHOWN", 8)
    options = OPTIONS | {"keep": 300, "keep_rows": 4}
    one, many = (probe_corpus(model, texts * n, **options) for n in (1, 4))
    for name, array in vars(one).items():
        if isinstance(array, np.ndarray):
            assert getattr(many, name).shape == array.shape, name
    assert many.n_sparse == 4 * one.n_sparse
    assert len(many.table.a) <= 300
    assert len(many.kept) <= 4
    assert 1 <= sum(map(bool, many.tokens)) <= 2 * 8
    sizes = [report.save(tmp_path / f"{i}").stat().st_size for i, report in enumerate((one, many))]
    assert sizes[1] < sizes[0] + 4 * len(many.tokens) + 20_000  # an empty entry for each prompt


def test_tokens_end_a_corpus(model: Any, texts: list[str]) -> None:
    rows, read = windows(model, texts, 24), 0
    wanted = next(i for i, row in enumerate(rows, 1) if (read := read + len(row)) >= 300)
    few = probe_corpus(model, texts, tokens=300, **OPTIONS)
    assert len(few.tokens) == wanted
    assert few.n_tokens == read


def test_the_error_ends_a_corpus(model: Any, texts: list[str], whole: CollapseReport) -> None:
    """It ends with the first block after which the error is small enough."""
    error = 100 * whole.sigma_error(0.01)
    reached = probe_corpus(model, texts * 4, until=error, **OPTIONS)
    assert 100 * reached.sigma_error(0.01) < error
    read = cut.Cut(model, texts * 4, context=24, batch_size=8, most=None, prepend_bos=None)
    ends = np.cumsum([block.tokens for block in read.blocks()])
    assert reached.n_tokens in ends[1:-1]
    end = int(ends[ends < reached.n_tokens][-1])
    before = probe_corpus(model, texts * 4, tokens=end, **OPTIONS)
    assert before.n_tokens == end
    assert 100 * before.sigma_error(0.01) >= error


# -- stopped and resumed --------------------------------------------------------------------------


class Texts(list[str]):
    """Texts, at one of which something happens."""

    at, happens = -1, staticmethod(lambda: None)

    def __iter__(self) -> Iterator[str]:
        for number, text in enumerate(list.__iter__(self)):
            if number == self.at:
                self.happens()
            yield text


def test_a_corpus_says_that_code_is_compiled_first(
    model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooks.kernels.is_ready", lambda function: False)
    probe_corpus(model, models.shakespeare()[:1], **OPTIONS | {"progress": True})
    assert capsys.readouterr().err.count("compiling for this processor, once") == 1


def test_what_was_done_before_is_no_part_of_the_speed(
    model: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = probe_corpus(model, texts, out=tmp_path, **OPTIONS)
    probe_corpus(model, texts, out=tmp_path, **OPTIONS | {"progress": True})
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"corpus: {first.n_tokens} tokens, ")
    assert ", 0 a second" in line  # all of it was there


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bits(
    model: Any, texts: list[str], whole: CollapseReport, number: int, tmp_path: Path
) -> None:
    for at in (1, 9, 20, 21, 33):
        stopping = Texts(texts)
        stopping.at, stopping.happens = at, lambda: os.kill(os.getpid(), number)  # type: ignore[assignment]
        with pytest.raises(Stopped, match="the same command goes on") as stopped:
            probe_corpus(model, stopping, out=tmp_path, save_every=1e-9, **OPTIONS)
        assert stopped.value.signal == number
    again = probe_corpus(model, texts, out=tmp_path, **OPTIONS)
    assert_equal(again, whole)
    assert again.model == whole.model
    (path,) = tmp_path.glob("part-*.safetensors")
    saved = path.read_bytes()
    assert_equal(probe_corpus(model, texts, out=tmp_path, **OPTIONS), whole)  # there at once
    assert path.read_bytes() == saved
    probe_corpus(model, texts, out=tmp_path / "undisturbed", **OPTIONS)
    assert (tmp_path / "undisturbed" / path.name).read_bytes() == saved


def test_a_full_disk_leaves_the_state_before(
    model: Any,
    texts: list[str],
    whole: CollapseReport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = [3]

    def fsync(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left on device; not written, the file of"):
            probe_corpus(model, texts, out=tmp_path, save_every=1e-9, **OPTIONS)
    (path,) = tmp_path.glob("part-*.safetensors")
    ends = np.cumsum(
        [
            block.tokens
            for block in cut.Cut(
                model, texts, context=24, batch_size=8, most=None, prepend_bos=None
            ).blocks()
        ]
    )
    assert CollapseReport.load(path).n_tokens == ends[2]
    assert not [*tmp_path.glob("*.draft")]
    assert_equal(probe_corpus(model, texts, out=tmp_path, **OPTIONS), whole)


def test_a_second_process_and_another_run_are_refused(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    stopping = Texts(texts)

    def inside() -> None:
        with pytest.raises(ValueError, match="out: wanted a directory that no other process"):
            probe_corpus(model, texts, out=tmp_path, **OPTIONS)

    stopping.at, stopping.happens = 9, inside  # type: ignore[assignment]
    probe_corpus(model, stopping, out=tmp_path, **OPTIONS)
    other = models.tiny_llama(tokenizer=model.tokenizer, seed=1)
    for mine, given, options, said in (
        (other, texts, {}, "fingerprint"),
        (model, texts, {"context": 20}, "context 20 instead of 24"),
        (model, texts, {"sigmas": [0.1]}, "equal settings"),
        (model, texts, {"tokens": 99}, "tokens 99 instead of None"),
    ):
        with pytest.raises(ValueError, match=f"out: wanted another directory.*{said}"):
            probe_corpus(mine, given, out=tmp_path, **OPTIONS | options)


def test_other_documents_are_seen(model: Any, texts: list[str], tmp_path: Path) -> None:
    stopping = Texts(texts)
    stopping.at, stopping.happens = 20, lambda: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[assignment]
    with pytest.raises(Stopped):
        probe_corpus(model, stopping, out=tmp_path, **OPTIONS)
    for others in (["Other words", *texts[2:]], texts[:5]):
        with pytest.raises(ValueError, match="dataset: wanted the documents that were read"):
            probe_corpus(model, others, out=tmp_path, **OPTIONS)


# -- spread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_any_split_gives_the_report_of_one(
    model: Any, texts: list[str], whole: CollapseReport, n: int, tmp_path: Path
) -> None:
    """Sums up to the rounding of their order; rows, table, tokens: all the same."""
    for i in range(1, n + 1):
        probe_corpus(model, texts, shard=(i, n), out=tmp_path / str(i % 2), **OPTIONS)
    merged = merge_corpus([tmp_path / "1", *([tmp_path / "0"] if n > 1 else [])])
    assert_equal(merged, whole, rtol=1e-12)
    assert merged.model == whole.model
    assert merged.summary() == whole.summary()


def test_shards_that_do_not_make_a_whole_are_named(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "parts"
    for i in (1, 3):
        probe_corpus(model, texts, shard=(i, 3), out=folder, **OPTIONS)
    with pytest.raises(ValueError, match=r"shards of 3: wanted all; got none for 2: .*--shard 2/3"):
        merge_corpus(folder)
    probe_corpus(model, texts, shard=(1, 3), out=tmp_path / "twice", **OPTIONS)
    with pytest.raises(ValueError, match="shard 1 of 3: wanted it once; got it in"):
        merge_corpus([folder, tmp_path / "twice"])
    probe_corpus(model, texts[:20], shard=(2, 3), out=tmp_path / "less", **OPTIONS)
    with pytest.raises(ValueError, match=r"got digest .* instead of .*: the data set changed"):
        merge_corpus([folder, tmp_path / "less"])
    stopping = Texts(texts)
    stopping.at, stopping.happens = 20, lambda: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[assignment]
    with pytest.raises(Stopped):
        probe_corpus(model, stopping, shard=(2, 3), out=tmp_path / "stopped", **OPTIONS)
    with pytest.raises(ValueError, match=r"shard 2 of 3: wanted it whole; got \d+ prompts in"):
        merge_corpus([folder, tmp_path / "stopped"])
    probe_corpus(model, texts, shard=(2, 2), out=tmp_path / "two", **OPTIONS)
    with pytest.raises(ValueError, match=r"wanted a shard of 3, as .*; got one of 2"):
        merge_corpus([folder, tmp_path / "two"])
    other = models.tiny_llama(tokenizer=model.tokenizer, seed=1)
    probe_corpus(other, texts, shard=(2, 3), out=tmp_path / "model", **OPTIONS)
    with pytest.raises(ValueError, match="wanted reports of one model; got fingerprint"):
        merge_corpus([folder, tmp_path / "model"])
    with pytest.raises(ValueError, match=r"wanted parts of a corpus .*; got none in /"):
        merge_corpus(tmp_path)
    report = hooks.collapse_probe(model, [[1, 2, 3]], sigmas=[0.1], progress=False)
    with pytest.raises(ValueError, match="wanted a part of a corpus; got another"):
        merge_corpus(report.save(tmp_path / "report.safetensors"))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),  # torchrun, accelerate launch
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),  # srun
        ({"RANK": "2", "WORLD_SIZE": "3", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (2, 3)),
    ],
)
def test_ranks_are_those_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, str], wanted: tuple[int, int]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert rank_and_size() == (0, 1)  # nobody to meet: an interactive job
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert rank_and_size() == wanted


def test_a_shard_cuts_only_its_own_documents(
    model: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside them the first block's, to check the model; after a stop, none that was counted."""
    cut_texts: list[str] = []

    def recorded(model: Any, text: str, prepend_bos: Any) -> Any:
        cut_texts.append(text)
        return original(model, text, prepend_bos)

    original = cut.text_tokens
    monkeypatch.setattr(cut, "text_tokens", recorded)
    groups: list[set[str]] = [set()]
    size = 0
    for text in texts:
        groups[-1] |= {text} if text.strip() else set()
        size += len(text) + 1
        if size >= 2 * 8 * 24:  # two characters for each token of a block, here a batch
            groups, size = [*groups, set()], 0
    for i in (0, 1, 2):
        cut_texts.clear()
        probe_corpus(model, texts, shard=(i + 1, 3), out=tmp_path, **OPTIONS)
        own = set[str]().union(*groups[i::3])
        assert own <= {*cut_texts} <= own | groups[0]
        cut_texts.clear()
        probe_corpus(model, texts, shard=(i + 1, 3), out=tmp_path, **OPTIONS)
        assert {*cut_texts} <= groups[0]


def test_a_part_of_an_earlier_version_is_refused(
    model: Any, texts: list[str], tmp_path: Path
) -> None:
    report = probe_corpus(model, texts, out=tmp_path, **OPTIONS)
    (path,) = tmp_path.glob("part-*.safetensors")
    fact = report.model["corpus"]
    done = {n: x for n, x in fact["done"].items() if n not in ("groups", "windows")}
    old = replace(report, model={**report.model, "corpus": {**fact, "done": done}})
    old.save(path)
    for use in (
        lambda: probe_corpus(model, texts, out=tmp_path, **OPTIONS),
        lambda: merge_corpus(path),
    ):
        with pytest.raises(ValueError, match="got one of an earlier version, which dealt windows"):
            use()


def test_another_tokenizer_is_refused(model: Any, texts: list[str], tmp_path: Path) -> None:
    probe_corpus(model, texts, out=tmp_path, **OPTIONS)
    other = models.tiny_llama(tokenizer=copy.deepcopy(model.tokenizer))
    other.tokenizer.add_tokens(["sulphurous"])
    with pytest.raises(ValueError, match="got tokenizer '"):
        probe_corpus(other, texts, out=tmp_path, **OPTIONS)


def test_kept_rows_are_drawn_again(model: Any, whole: CollapseReport) -> None:
    """The prompt alone, under the number that the report gives, shows the noisy row."""
    for row in range(len(whole.kept)):
        prompt = int(whole.kept.prompt[row])
        if not whole.tokens[prompt] or whole.kept.draw[row] < 0:
            continue
        ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(list(whole.tokens[prompt]))])
        noise = whole.kept_noise(row)
        layer = int(whole.kept.layer[row])
        name = f"blocks.{layer}.attn.hook_pattern"
        number = whole.model["numbers"][str(prompt)]
        with noise.applied(model, first_prompt=number):
            _, cache = model.run_with_cache(ids, names_filter=name)
        _, noisy = whole.kept.weights(row)
        got = cache[name][0, int(whole.kept.head[row]), int(whole.kept.query[row])]
        np.testing.assert_allclose(got[: len(noisy)].numpy(), noisy, atol=1e-5)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ({"a.jsonl": '{"x": "one"}\n'}, {"column": "y"}, r"column: wanted one of \['x'\]; got 'y'"),
        (
            {"a.jsonl": '{"x": "a", "y": "b"}\n'},
            {},
            r"column: wanted its name, or one column of text",
        ),
        ({"a.jsonl": '{"text": 3}\n'}, {}, "wanted text in column 'text'; got 3 in row 0"),
        ({"a.jsonl": ""}, {}, "dataset: wanted"),
        ({"a.jsonl": "no json\n"}, {}, "dataset: wanted files of json that can be read; got"),
        ({"a.parquet": "no parquet"}, {}, "dataset: wanted files of parquet that can be read"),
        (
            {"a.jsonl": "{}", "b.csv": "text\n"},
            {},
            "dataset: wanted files all of one .* csv and json together in",
        ),
        ({"a.bin": "x"}, {}, "dataset: wanted files all of one kind, of"),
        ({"a.txt": "  \n"}, {}, "dataset: wanted a text of two tokens or more; got none"),
        ({"a.txt": "words"}, {"context": 999}, "context: wanted at most the model's 64 tokens"),
        ({"a.txt": "words"}, {"split": "test"}, "split: wanted none beside files"),
        ({"a.txt": "words"}, {"shard": (3, 2)}, "shard: wanted a pair"),
        ({"a.txt": "words"}, {"shard": (1, 2), "until": 1.0}, "until: wanted one process"),
    ],
)
def test_bad_input_is_named(
    model: Any, content: dict[str, str], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    path = tmp_path if len(content) > 1 else tmp_path / next(iter(content))
    with pytest.raises(ValueError, match=said):
        probe_corpus(model, path, **OPTIONS | options)


def test_a_data_set_that_is_not_there(model: Any, tmp_path: Path) -> None:
    for name in (tmp_path / "none", "none.jsonl", "none/", "./none"):
        with pytest.raises(ValueError, match="dataset: wanted a file or folder that is there"):
            probe_corpus(model, name, **OPTIONS)
    with pytest.raises(ValueError, match="dataset: wanted a data set of the Hugging Face Hub"):
        probe_corpus(model, "nobody/nothing-of-the-kind", **OPTIONS)
    with pytest.raises(ValueError, match="got 'none', which is no file or folder here: "):
        probe_corpus(model, "none", **OPTIONS)
    with shape_checks_off(), pytest.raises(TypeError, match="dataset: wanted a file, a folder"):
        probe_corpus(model, 3, **OPTIONS)
    with pytest.raises(ValueError, match="text: wanted a model with its tokenizer"):
        probe_corpus(models.tiny_llama(), ["words"], **OPTIONS)


def test_a_model_that_changes_meanwhile_is_refused(tokenizer: Any, texts: list[str]) -> None:
    model = models.tiny_llama(tokenizer=tokenizer)
    changing = Texts(texts)

    def change() -> None:
        next(model.parameters()).data.mul_(1.5)

    changing.at, changing.happens = 20, change  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model: wanted it unchanged.*fingerprint"):
        probe_corpus(model, changing, **OPTIONS)


def test_a_file_in_the_place_of_the_directory_is_named(model: Any, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    for out in (there, there / "below"):
        with pytest.raises(ValueError, match="out: wanted a directory; got a file"):
            probe_corpus(model, ["many words"], out=out, **OPTIONS)
    assert there.read_text() == "mine"
