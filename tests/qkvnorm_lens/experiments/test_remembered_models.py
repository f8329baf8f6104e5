"""What an experiment remembers of a model, it remembers of its bytes and not of its path."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from qkvnorm_lens import experiments
from qkvnorm_lens.experiments.core import base, running
from qkvnorm_lens.experiments.core.base import Part, Subject
from qkvnorm_lens.experiments.core.digest import digest_of, digest_of_hub
from qkvnorm_lens.experiments.core.subjects import find_subjects
from qkvnorm_lens.models import loading
from qkvnorm_lens.models.bridge import save_pretrained
from qkvnorm_lens.models.cards import read_card, write_card
from qkvnorm_lens.models.shipped import checkpoint_path
from tests.support.counting import Counting


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    base.latest.clear()
    yield
    base.latest.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_path("addition-qkv"), tmp_path / "models" / "mine"))


def other_weights(folder: Path) -> None:
    model = loading.load_model(str(folder))
    with torch.no_grad():
        for parameter in model.original_model.parameters():
            parameter.mul_(1.5)
    save_pretrained(model, folder)


def other_configuration(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["eps"] = 0.5
    path.write_text(json.dumps(values))


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    path.write_text(json.dumps(values))


def other_directory(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(checkpoint_path("addition-none"), folder)


def other_card(folder: Path) -> None:
    path = folder / "card.json"
    card = read_card(path)
    card["run"]["split"] = {"counts": [2], "digits": [1]}
    write_card(card, path)


CHANGES: list[Callable[[Path], None]] = [
    other_weights, other_configuration, other_tokenizer, other_directory, other_card,
]  # fmt: skip


def rates(name: str, out: Path) -> pd.DataFrame:
    outcome = experiments.run("collapse", [name], out=out, size="smoke", progress=False)
    return outcome.table


@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        pytest.param(other_configuration, marks=pytest.mark.slow),
        pytest.param(other_directory, marks=pytest.mark.slow),
    ],
)
def test_a_directory_written_anew_gives_its_own_numbers(
    change: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    before = rates(str(folder), tmp_path / "out")
    change(folder)
    after = rates(str(folder), tmp_path / "out")
    base.latest.clear()  # as in a session of its own
    alone = rates(str(folder), tmp_path / "alone")
    assert not before.equals(after)
    pd.testing.assert_frame_equal(after, alone, check_exact=True)


def measured(subject: Subject) -> pd.DataFrame:
    """What the model in memory is: of its weights, its norm's eps, its tokens, its sums."""
    model = subject.load()
    weights = sum(float(p.detach().double().abs().sum()) for p in model.original_model.parameters())
    ids = model.tokenizer.get_vocab()["1"]
    counts = str(subject.split.counts)
    return pd.DataFrame([{"w": weights, "eps": model.cfg.eps, "one": ids, "counts": counts}])


def of_model(name: str, out: Path) -> pd.DataFrame:
    def parts(subjects: tuple[Subject, ...], size: str) -> list[Part]:
        return [Part(s.name, partial(measured, s), s) for s in subjects]

    experiment = dataclasses.replace(Counting().experiment(), parts=parts)
    return running.run_experiment(experiment, find_subjects([name]), out, progress=False).table


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_rewritten_is_measured(
    change: Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    before = of_model(str(folder), tmp_path / "out")
    change(folder)
    after = of_model(str(folder), tmp_path / "out")
    base.latest.clear()
    assert not before.equals(after)
    pd.testing.assert_frame_equal(after, of_model(str(folder), tmp_path / "alone"))


def test_a_link_that_leads_elsewhere_is_another_model(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    before = of_model(str(link), tmp_path / "out")
    link.unlink()
    link.symlink_to(checkpoint_path("addition-pre"))
    after = of_model(str(link), tmp_path / "out")
    assert not before.equals(after)
    link.unlink()
    link.symlink_to(folder)
    pd.testing.assert_frame_equal(of_model(str(link), tmp_path / "out"), before)


def test_what_lies_as_it_did_is_not_loaded_again(folder: Path, tmp_path: Path) -> None:
    (subject,) = find_subjects([str(folder)])
    model = subject.load()
    assert subject.load() is model
    assert find_subjects([str(folder)])[0].load() is model


@pytest.mark.parametrize("change", [other_weights, other_configuration, other_tokenizer])
def test_a_model_rewritten_while_a_run_has_begun_is_refused(
    change: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (subject,) = find_subjects([str(folder)])
    change(folder)
    with pytest.raises(ValueError, match=f"wanted the model of digest {subject.digest}"):
        subject.load()
    (subject,) = find_subjects([str(folder)])
    load = loading.load_model

    def meanwhile(name: str) -> Any:
        model = load(name)
        (folder / "config.json").write_text('{"a": 1}')
        return model

    monkeypatch.setattr("qkvnorm_lens.models.load_model", meanwhile)
    with pytest.raises(ValueError, match="another was written in its place"):
        subject.load()
    assert "model" not in base.latest


@pytest.mark.slow
def test_a_name_on_the_hub_stands_for_what_the_cache_holds(gpt2_hub: Path, tmp_path: Path) -> None:
    (subject,) = find_subjects(["gpt2"])
    assert subject.digest == digest_of_hub("gpt2") != ""
    snapshot = next(gpt2_hub.glob("models--gpt2/snapshots/*"))
    assert subject.digest == digest_of(snapshot)
    assert digest_of_hub("nobody/nothing") == ""
    assert digest_of_hub("not a name at all") == ""


def test_parts_of_a_model_nobody_knows_are_made_again(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    for counting in (first, again):
        counting.subject = dataclasses.replace(counting.subject, digest="")
        running.run_experiment(counting.experiment(), [counting.subject], tmp_path, progress=False)
        assert counting.worked == ["a", "b", "c"]


# -- parts ----------------------------------------------------------------------------------------


def _altered(part: dict[str, Any], how: str) -> Any:
    if how == "number":
        part["rows"][0][1] = 0.4
    elif how == "row gone":
        del part["rows"][0]
    elif how == "row twice":
        part["rows"].append(part["rows"][0])
    elif how == "columns":
        part["columns"].reverse()
    elif how == "seconds":
        part["seconds"] = 10**6
    elif how == "no digest":
        del part["digest"]
    return part


HOW = ["number", "row gone", "row twice", "columns", "seconds", "no digest"]


@pytest.mark.parametrize("how", HOW)
def test_a_part_whose_numbers_were_altered_is_made_again(how: str, tmp_path: Path) -> None:
    first = running.run_experiment(Counting().experiment(), [Counting().subject], tmp_path)
    path = first.folder / "parts" / "quick" / "b.json"
    path.write_text(json.dumps(_altered(json.loads(path.read_text()), how)))
    again = Counting()
    second = running.run_experiment(again.experiment(), [again.subject], tmp_path, progress=False)
    assert again.worked == ["b"]
    pd.testing.assert_frame_equal(second.table, first.table, check_exact=True)
    third = Counting()
    running.run_experiment(third.experiment(), [third.subject], tmp_path, progress=False)
    assert third.worked == []


@pytest.mark.parametrize("left", ["", "[]", "{", '{"size": 3}', "[" * 100_000])
def test_results_whose_size_cannot_be_read_are_not_written_over(left: str, tmp_path: Path) -> None:
    first = running.run_experiment(Counting().experiment(), [Counting().subject], tmp_path)
    (first.folder / "about.json").write_text(left)
    with pytest.raises(ValueError, match=r"about.json: wanted .*; got something else: delete it"):
        running.run_experiment(Counting().experiment(), [Counting().subject], tmp_path)
