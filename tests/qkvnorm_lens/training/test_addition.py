"""The task: format, arithmetic, statistics, speed of the generator, tokenizer, accuracy."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch

from qkvnorm_lens.training.addition import (
    END,
    PAD,
    SPLITS,
    VOCAB,
    AccuracyCounter,
    Split,
    build_tokenizer,
    draw,
)

TERM = re.compile(r"([+-]?)(N?)(\d+)")


def rows(split: str | Split, n: int, seed: int = 0) -> list[tuple[str, str]]:
    batch = draw(split, n, seed=seed)
    return [
        ("".join(VOCAB[i] for i in tokens), "".join(VOCAB[i] for i in targets))
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]


def parse(expression: str) -> list[int]:
    """Signed terms, by plain Python, knowing nothing of the generator."""
    found = list(TERM.finditer(expression))
    assert "".join(m.group() for m in found) == expression
    assert found[0].group(1) == ""
    assert all(m.group(1) for m in found[1:])
    signs = [(-1) ** ((m.group(1) == "-") + (m.group(2) == "N")) for m in found]
    return [s * int(m.group(3)) for s, m in zip(signs, found, strict=True)]


def test_unsigned_sums_are_positive_and_added() -> None:
    plain = Split((2, 3), (3,), signed=False)
    for tokens, targets in rows(plain, 300, seed=5):
        expression, answer = tokens.rstrip("*")[1:].split("=")
        assert re.fullmatch(r"\d{3}(\+\d{3}){1,2}", expression)
        assert int(answer) == sum(int(n) for n in expression.split("+"))
        assert targets.strip("*") == f"{answer}]"


def test_old_files_say_nothing_of_signs() -> None:
    assert "signed" not in SPLITS["small-train"].to_json()
    assert Split(**Split((2,), (3,), signed=False).to_json()) == Split((2,), (3,), signed=False)


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_every_row_is_a_right_sum_in_the_decoder_format(name: str) -> None:
    split = SPLITS[name]
    for tokens, targets in rows(name, 200, seed=3):
        text = tokens.rstrip("*")
        assert "*" not in text
        assert text.startswith("[")
        assert text.count("=") == 1
        expression, answer = text[1:].split("=")
        terms = parse(expression)
        total = sum(terms)
        assert answer == (str(total) if total >= 0 else f"N{-total}")
        assert len(terms) in split.counts
        for number in re.findall(r"\d+", expression):
            assert len(number) in split.digits
            assert number[0] != "0"
        scored = "*" * (1 + len(expression)) + answer + "]"
        assert targets == scored.ljust(len(targets), "*")
        assert len(text) <= split.max_length


def test_the_papers_example_is_in_this_format() -> None:
    assert parse("453+16+17-N846") == [453, 16, 17, 846]
    assert sum(parse("453+16+17-N846")) == 1332


@pytest.mark.parametrize(
    ("name", "mean_length", "longest"),
    [
        ("paper-train", 22.0, 36),
        ("paper-interpolation", 24.7, 31),
        ("paper-extrapolation", 36.8, 51),
    ],
)
def test_lengths_are_the_papers(name: str, mean_length: float, longest: int) -> None:
    batch = draw(name, 200_000, seed=0)
    lengths = (batch.tokens != PAD).sum(1)
    assert lengths.double().mean().item() == pytest.approx(mean_length, abs=0.1)
    assert SPLITS[name].max_length == longest
    assert lengths.max() <= longest


def test_a_training_row_has_4_63_scored_tokens() -> None:
    batch = draw("paper-train", 200_000, seed=1)
    assert batch.scored.sum(1).double().mean().item() == pytest.approx(4.63, abs=0.02)
    share = (batch.targets == END).sum().item() / batch.scored.sum().item()
    assert share == pytest.approx(0.216, abs=0.002)


def test_counts_digits_signs_and_operators_are_uniform_and_independent() -> None:
    n = 20_000
    texts = [t[1:].split("=")[0] for t, _ in rows("paper-train", n, seed=5)]
    counts = np.array([len(TERM.findall(t)) for t in texts])
    numbers = [m for t in texts for m in TERM.findall(t)]
    error = 4.5 / np.sqrt(n)  # > 4 standard errors of the loosest share below
    for count in (3, 4, 6):
        assert np.mean(counts == count) == pytest.approx(1 / 3, abs=error)
    assert np.mean([len(d) == 2 for _, _, d in numbers]) == pytest.approx(0.5, abs=error)
    assert np.mean([s == "N" for _, s, _ in numbers]) == pytest.approx(0.5, abs=error)
    operators = [o for o, _, _ in numbers if o]
    assert np.mean([o == "-" for o in operators]) == pytest.approx(0.5, abs=error)
    two = np.array([int(d) for _, _, d in numbers if len(d) == 2])
    assert two.min() == 10
    assert two.max() == 99
    assert two.mean() == pytest.approx(54.5, abs=1.0)


def test_the_seed_decides_and_the_global_state_does_not_matter() -> None:
    np.random.seed(1)  # noqa: NPY002 - the global state is the point
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = draw("small-train", 100, seed=(1, 2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(first.tokens, draw("small-train", 100, seed=(1, 2)).tokens)
    assert not torch.equal(first.tokens[:, :5], draw("small-train", 100, seed=(1, 3)).tokens[:, :5])


def test_a_million_rows_a_minute_on_one_core() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        draw("paper-train", 1000, seed=0)
        began = time.process_time()
        for step in range(20):
            draw("paper-train", 1000, seed=(0, step))
        seconds = time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    assert 20_000 / seconds * 60 > 1_000_000


def test_by_length_keeps_every_row_and_crops() -> None:
    batch = draw("small-train", 99, seed=0)
    parts = batch.by_length(4)
    assert sum(len(p.tokens) for p in parts) == 99
    assert [p.tokens.shape[1] for p in parts] == sorted(p.tokens.shape[1] for p in parts)
    assert sum(int(p.scored.sum()) for p in parts) == int(batch.scored.sum())
    whole = {tuple(r) for r in batch.tokens.tolist()}
    for part in parts:
        width = batch.tokens.shape[1] - part.tokens.shape[1]
        assert {tuple(r + [PAD] * width) for r in part.tokens.tolist()} <= whole


def test_accuracy_with_and_without_the_end_against_a_count_by_hand() -> None:
    targets = torch.tensor([[PAD, 1, 2, END], [PAD, 3, END, PAD]])
    said = torch.tensor([[9, 1, 2, 0], [9, 4, END, 9]])  # wrong: row 0 at ], row 1 at its digit
    logits = torch.nn.functional.one_hot(said, len(VOCAB)).float()
    counter = AccuracyCounter()
    counter.update(logits, targets)
    result = counter.result()
    assert result.per_token == 3 / 5
    assert result.per_token_without_end == 2 / 3
    assert result.exact == 0.0
    assert result.exact_without_end == 1 / 2
    assert result.rows == 2
    counter.update(torch.nn.functional.one_hot(targets, len(VOCAB)).float(), targets)
    assert counter.result().exact == 1 / 2
    with pytest.raises(ValueError, match="at least one"):
        AccuracyCounter().result()


def test_tokenizer_is_a_real_one() -> None:
    tokenizer = build_tokenizer()
    text = "[453+16+17-N846=1332]"
    ids = tokenizer(text)["input_ids"]
    assert ids == [VOCAB.index(c) for c in text]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("*", "[", "]")
    assert len(tokenizer) == 17
    assert tokenizer.vocab_size == 17
    padded = tokenizer(["[1+2=", "[10+2="], padding=True)["input_ids"]
    assert padded[0][-1] == PAD
    assert len(padded[0]) == len(padded[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split((), (1,)), "counts: wanted"),
        (lambda: Split((2,), (0,)), "digits: wanted"),
        (lambda: draw("no-such", 1, seed=0), "small-train"),
        (lambda: draw("small-train", 0, seed=0), "n: wanted an integer >= 1; got 0"),
    ],
)
def test_bad_input_says_what_is_wanted(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
