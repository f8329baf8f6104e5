"""The command line: what it prints and writes is what Python gives, and errors are one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import hooks
import qkvnorm_lens
from hooks.noise import norm_noise as noise
from qkvnorm_lens import tables as _tables, text, training
from qkvnorm_lens.cli import build_parser, main, probe as _probe
from qkvnorm_lens.models import loading
from qkvnorm_lens.models.shipped import checkpoint_card, checkpoints, load_checkpoint
from qkvnorm_lens.training.addition import VOCAB
from tests import models

QUICK = ["--sigmas", "0.4,0.5", "--draws", "2", "--layers", "0"]
SUMS = ["probe", "--prompts", "4", *QUICK]
CHARACTERS = "".join(chr(c) for c in range(32, 126)) + "\n"  # with the unknown and bos: VOCAB
PROSE = "It is a truth universally acknowledged, that a single man must be in want of a wife. "

# One thread: of several, those that wait for a busy core would spin.
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit code, standard output and standard error of a command."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def printed() -> str:
    """What `SUMS` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(SUMS) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def wanted() -> hooks.CollapseReport:
    """What Python gives for `SUMS`."""
    split = training.trained_on(loading.find("addition-pre"))
    assert split is not None
    ids = text.sums(split, 4, seed=0).ids
    model = loading.load_model("addition-pre")
    return hooks.collapse_probe(model, ids, sigmas=[0.4, 0.5], draws=2, layers=[0])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command gives to `collapse_probe`, which then refuses to go on."""
    given: dict[str, Any] = {}

    def probe(model: Any, tokens: Any, **options: Any) -> None:
        given.update(options, tokens=tokens)
        raise ValueError("enough")

    monkeypatch.setattr(hooks, "collapse_probe", probe)
    return given


def characters() -> Any:
    """A tokenizer of single characters with a bos of its own, 97 tokens in all."""
    from tokenizers import Regex, Tokenizer, decoders, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<bos>", "<unk>", *CHARACTERS]
    words = kinds.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<bos>",
        unk_token="<unk>",
        pad_token="<bos>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2 as Hugging Face saves it, context 64."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    models.tiny_hf(GPT2LMHeadModel, models.tiny_gpt2_config()).save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mamba_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A family without attention."""
    folder = tmp_path_factory.mktemp("tiny-mamba")
    config = MambaConfig(vocab_size=models.VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    models.tiny_hf(MambaForCausalLM, config).save_pretrained(folder)
    characters().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ours_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One of our models saved by a user: no card."""
    folder = tmp_path_factory.mktemp("ours")
    qkvnorm_lens.save_pretrained(load_checkpoint(), folder)
    return str(folder)


# -- the package ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", qkvnorm_lens.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(qkvnorm_lens, name) is not None
    assert name in dir(qkvnorm_lens)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        qkvnorm_lens.nothing  # noqa: B018


def test_help_needs_nothing_heavy() -> None:
    code = "import sys, qkvnorm_lens.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "transformer_lens", "numpy", "pandas", "matplotlib", "hooks"}
    assert not heavy & set(done.stdout.split())


# -- the parser agrees with the library -----------------------------------------------------------


def _action(name: str) -> Any:
    args = build_parser()
    (commands,) = (a for a in args._actions if a.choices and "probe" in a.choices)
    probe = commands.choices["probe"]
    return next(a for a in probe._actions if a.dest == name)


def test_choices_are_the_librarys() -> None:
    assert set(_action("law").choices) == set(hooks.LAWS)
    assert set(_action("shared").choices) == set(get_args(noise.Shared))
    assert set(_action("method").choices) == {"exact", "sample"}


@pytest.mark.parametrize(
    "name", ["on", "method", "law", "shared", "sparse", "draws", "seed", "keep"]
)
def test_defaults_are_the_librarys(name: str) -> None:
    assert _action(name).default == inspect.signature(hooks.collapse_probe).parameters[name].default


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0.01,0.05", [0.01, 0.05]),
        ("1%, 5%", [0.01, 0.05]),
        ("0.1:0.3:3", [0.1, 0.2, 0.3]),
        ("0%:50%:2", [0, 0.5]),
    ],
)
def test_sigmas(given: str, wanted: list[float]) -> None:
    assert _probe.sigmas(given) == pytest.approx(wanted)


@pytest.mark.parametrize(("given", "wanted"), [("3", [3]), ("0,5-7", [0, 5, 6, 7])])
def test_layers(given: str, wanted: list[int]) -> None:
    assert _probe.layers(given) == wanted


@pytest.mark.parametrize(
    "argv",
    [
        ["nothing"],
        ["probe", "--sigmas", "much"],
        ["probe", "--sigmas=-0.1"],
        ["probe", "--sigmas", "nan"],
        ["probe", "--sigmas", "inf"],
        ["probe", "--on", "x"],
        ["probe", "--on", "qq"],
        ["probe", "--draws", "-1"],
        ["probe", "--draws", "1e3"],
        ["probe", "--batch-size", "0"],
        ["probe", "--batch-size", str(2**70)],
        ["probe", "--sparse", "2"],
        ["probe", "--sparse", "nan"],
        ["probe", "--length", "1"],
        ["probe", "--keep", "0"],
        ["probe", "--out", ""],
        ["probe", "--prompts"],
        ["probe", "--json=yes"],
        ["probe", "addition-pre", "gpt2"],
        ["train"],
        ["train", "--out", "x", "--lr", "0"],
        ["train", "--out", "x", "--placement", "post"],
        ["experiment", "collapse", "--full", "--smoke"],
        ["probe", "--sigmas", "0.1:0.2"],
        ["probe", "--layers", "7-5"],
        ["probe", "--layers", "first"],
        ["probe", "--law", "cauchy"],
        ["probe", "--prompts", "0"],
        ["probe", "--seed", "-1"],
        ["probe", "--text", "a", "--file", "b"],
        ["models", "addition-pre"],
    ],
)
def test_wrong_usage_is_2(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"qkvnorm-lens: error: [^:]+: wanted .*; got .*\n", err)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["prob"], "probe"),
        (["modles"], "models"),
        (["Train"], "train"),
        (["probe", "--sigam", "0.1"], "--sigmas"),
        (["probe", "--sigma=0.1"], "--sigmas"),
        (["probe", "--no-sink"], "--no-sinks"),
        (["probe", "--law", "unifrom"], "uniform"),
        (["probe", "--shared", "token s"], "token"),
        (["probe", "--dtype", "bfloat"], "bfloat16"),
        (["report", ".", "--ouput", "x"], "--out"),
        (["train", "--out", "x", "--recpie", "paper"], "--recipe"),
        (["experiment", "colapse"], "collapse"),
        (["experiment", "list", "--modle", "x"], "--model"),
    ],
)
def test_a_typo_gets_a_suggestion(run: Run, argv: list[str], meant: str) -> None:
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.endswith(f"(did you mean {meant!r}?)\n")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("short", ["--sig", "--prompt", "--sp", "--dev", "--trace", "--o"])
def test_an_option_is_not_known_by_its_beginning(run: Run, short: str) -> None:
    """What another version adds must not change what a script says today."""
    code, out, err = run("probe", short, "1")
    assert (code, out) == (2, "")
    assert err.startswith(f"qkvnorm-lens: error: {short}: wanted an option of probe; got")


WITHOUT_TORCH = """
import sys
from qkvnorm_lens.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ["probe", "--sparse", "2"],
        ["probe", "./nowhere"],
        ["probe", "--out", __file__],
        ["probe", "--file", "nowhere.txt"],
        ["report", "nowhere"],
        ["report", os.path.dirname(__file__)],
        ["train", "--out", __file__],
    ],
)
def test_what_can_fail_early_fails_before_torch(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *argv], capture_output=True, text=True
    )
    assert done.returncode in (1, 2), done.stderr
    assert re.fullmatch(r"qkvnorm-lens: error: [^:]+: wanted .*; got .*\n", done.stderr)


def test_a_page_over_a_directory_is_refused_by_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.safetensors").write_bytes(b"")
    _refused(run("report", str(tmp_path), "--out", str(tmp_path)), "--out: wanted a file's name")
    inside = str(tmp_path / "report.safetensors" / "page.html")
    _refused(run("report", str(tmp_path), "--out", inside), "--out: wanted a directory; got the fi")


@pytest.mark.parametrize("argv", [["--help"], ["probe", "--help"], ["models", "--help"]])
def test_help(run: Run, argv: list[str]) -> None:
    code, out, err = run(*argv)
    assert code == 0
    assert out.startswith("usage: ")
    assert err == ""


def test_version_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qkvnorm_lens", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout == f"qkvnorm-lens {qkvnorm_lens.__version__}\n"


def test_without_a_command_the_commands_are_listed(run: Run) -> None:
    code, out, err = run()
    assert (code, out) == (2, "")
    for command in ("probe", "report", "models", "train", "experiment"):
        assert re.search(rf"^    {command}\b", err, re.M)


# -- models ---------------------------------------------------------------------------------------


def test_models_lists_every_shipped_model(run: Run) -> None:
    code, out, err = run("models")
    assert (code, err) == (0, "")
    for name in checkpoints():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        card = checkpoint_card(name)
        assert f"{card['parameters']:,}" in line
        for measured in card["accuracy"].values():
            assert f"{100 * measured['per_token']:.1f}%" in line
    assert json.loads(run("models", "--json")[1]) == {n: checkpoint_card(n) for n in checkpoints()}


def test_the_experiments_models_go_by_their_names(run: Run) -> None:
    from qkvnorm_lens.models.shipped import experiment_models

    named = run("models")[1]
    for name, path in experiment_models().items():
        assert f"{name.rpartition('-')[0]}-{{" in named
        assert loading.find(name) == loading.Source(name, "ours", path)
    code, out, _ = run("probe", "study-pre-1", "--prompts", "4", "--draws", "0")
    assert code == 0
    assert out.startswith("study-pre-1: 4 prompts")


# -- an addition model ----------------------------------------------------------------------------


def test_probe_prints_tables(printed: str, wanted: hooks.CollapseReport) -> None:
    assert wanted.n_sparse > 50
    assert printed.startswith(wanted.summary())
    rates, rest = printed.split("Share of sparse rows")[1].split("Heads, most fragile first")
    lines = [line.split() for line in rates.splitlines()]
    assert [line[0] for line in lines[2:4]] == ["40%", "50%"]
    loose = wanted.to_frame("model")["loose"].iloc[1]
    assert lines[3][1] == f"{100 * loose:.3g}"
    heads = _tables.heads(wanted)
    first = heads[heads["rows"] >= _tables.MIN_ROWS].nsmallest(1, "sigma_at").iloc[0]
    assert rest.splitlines()[2].split()[:2] == [
        f"L{first['layer']:.0f}H{first['head']:.0f}",
        _tables.percent(first["sigma_at"]),
    ]
    row = wanted.fragile(1).iloc[0]
    listed = rest.split("Most fragile rows")[1].splitlines()[2]
    assert listed.split()[0] == _tables.percent(row["sigma"])
    assert f'{row["jump_pos"]} "{row["jump_token"]}"' in listed
    assert "".join(wanted.tokens[row["prompt"]][: row["query_pos"] + 1]) in listed


def test_json_is_what_python_gives(run: Run, wanted: hooks.CollapseReport) -> None:
    code, out, err = run(*SUMS, "--json", "--fragile", "7")
    assert (code, err) == (0, "")
    told = json.loads(out)
    for key, frame in (("rates", wanted.to_frame("model")), ("fragile", wanted.fragile(7))):
        given = pd.DataFrame(told[key], columns=list(frame.columns))
        pd.testing.assert_frame_equal(given.astype(frame.dtypes), frame)
    by_head = wanted.sigma_at(0.01, by="head")
    assert isinstance(by_head, pd.DataFrame)
    for head in told["heads"]:
        value = by_head.loc[head["layer"], head["head"]]
        if head["sigma_at"] is None:  # never, or no rows
            assert not np.isfinite(value)
            assert np.isinf(value) == (head["rows"] > 0)
        else:
            assert head["sigma_at"] == value
    assert told["sigma_at"]["model"] == wanted.sigma_at(0.01)
    assert told["sigma_at"]["content"] == wanted.sigma_at(0.01, content=True)
    assert told["rows"]["sparse"] == wanted.n_sparse
    assert told["settings"]["sigmas"] == [0.4, 0.5]
    assert told["model"] == wanted.model
    assert told["summary"] == wanted.summary()


def test_out_writes_everything_and_the_report_loads(
    run: Run, tmp_path: Path, printed: str, wanted: hooks.CollapseReport
) -> None:
    folder = tmp_path / "new" / "folder"
    page = f"\nThis and more, to open in a browser: {folder / 'report.html'}\n"
    assert run(*SUMS, "--out", str(folder)) == (0, printed + page, "")
    assert run(*SUMS, "--out", str(folder), "--json")[1].endswith("}\n")
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "report.safetensors",
        "frame.csv",
        "summary.txt",
        "collapse.png",
        "heads.png",
        "rows.png",
    }
    report = hooks.CollapseReport.load(folder / "report.safetensors")
    pd.testing.assert_frame_equal(report.to_frame(), wanted.to_frame())
    pd.testing.assert_frame_equal(pd.read_csv(folder / "frame.csv"), wanted.to_frame())
    assert (folder / "summary.txt").read_text(encoding="utf-8") == printed
    assert (folder / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_a_probe_that_fails_leaves_no_directory(run: Run, tmp_path: Path, mamba_dir: str) -> None:
    new, there = tmp_path / "new", tmp_path / "there"
    there.mkdir()
    for folder in (new, there):
        code, out, err = run("probe", mamba_dir, "--text", "12+34", "--out", str(folder))
        assert (code, out) == (1, "")
        assert "attention" in err
    assert not new.exists()
    assert there.exists()


def test_without_matplotlib_only_the_figures_are_missing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_probe.importlib.util, "find_spec", lambda name: None)
    code, _, err = run(*SUMS, "--out", str(tmp_path))
    assert code == 0
    assert "pip install 'qkvnorm-lens[plots]'" in err
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".csv", ".txt", ".html"}


def test_lines_of_sums(run: Run, seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sums = "[12+34-N5=51\n\n  [7-9=N2\n"
    ids = [[VOCAB.index(c) for c in row] for row in ("[12+34-N5=51", "[7-9=N2")]
    _refused(run("probe", "--text", sums), "enough")
    assert seen["tokens"] == ids
    monkeypatch.setattr(sys, "stdin", io.StringIO(sums))
    run("probe", "--file", "-")
    assert seen["tokens"] == ids
    _, _, err = run("probe", "--text", sums, "--prompts", "1")
    assert "1 of 2 lines left out" in err
    assert seen["tokens"] == ids[:1]


def test_a_directory_of_ours(run: Run, ours_dir: str, printed: str) -> None:
    argv = ["probe", ours_dir, *SUMS[1:]]
    _refused(run(*argv), "--split")
    code, out, _ = run(*argv, "--split", "small-train")
    assert code == 0
    assert out.splitlines()[1:] == printed.splitlines()[1:]  # but the name


def test_every_option_reaches_the_probe(run: Run, seen: dict[str, Any]) -> None:
    argv = ["--method", "sample", "--layers", "0,2-3", "--law", "lognormal", "--shared", "heads"]
    argv += ["--on", "k", "--sparse", "0.9", "--seed", "3", "--draws", "5", "--sigmas", "1%"]
    rest = ["--batch-size", "2", "--prompts", "9", "--keep", "7"]
    _refused(run("probe", *argv, *rest), "enough")
    assert len(seen.pop("tokens")) == 9
    assert seen == {
        "sigmas": [0.01],
        "on": "k",
        "law": "lognormal",
        "method": "sample",
        "shared": "heads",
        "sparse": 0.9,
        "layers": [0, 2, 3],
        "draws": 5,
        "seed": 3,
        "batch_size": 2,
        "keep": 7,
    }
    run("probe")
    assert len(seen["tokens"]) == 128
    assert seen["batch_size"] > 8


def test_noise_that_never_moves_an_arg_max(run: Run) -> None:
    code, out, _ = run(*SUMS, "--on", "v")
    assert code == 0
    assert "never moves an arg max" in out
    assert "most fragile" not in out


def test_no_sparse_rows_is_said(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(*SUMS, "--sparse", "1", "--out", str(tmp_path))
    assert code == 0
    assert "No sparse row" in out
    assert "Share of sparse rows" not in out
    assert (tmp_path / "heads.png").exists()
    assert not (tmp_path / "rows.png").exists()


def test_bfloat16(run: Run) -> None:
    code, out, _ = run(*SUMS, "--dtype", "bfloat16", "--json")
    assert code == 0
    assert json.loads(out)["model"]["dtype"] == "bfloat16"


# -- a language model -----------------------------------------------------------------------------


def test_long_text_is_cut_and_the_rest_is_named(run: Run, gpt2_dir: str) -> None:
    argv = ["probe", gpt2_dir, *QUICK, "--text", 3 * PROSE, "--length", "33", "--prompts", "3"]
    code, out, err = run(*argv, "--json")
    assert code == 0
    left_out = f"{len(3 * PROSE) - 3 * 32} of {len(3 * PROSE)} tokens of the text left out"
    assert err.startswith(f"qkvnorm-lens: {left_out}")
    assert len(err.splitlines()) == 1
    read = json.loads(out)["read"]
    assert read["tokens"] == 3 * 33  # with bos
    assert read["left_out"].startswith(left_out)


def test_windows_hold_the_whole_text_behind_bos(gpt2_dir: str) -> None:
    model = loading.load_model(gpt2_dir)
    given = 2 * PROSE
    cut = text.windows(model, given, length=20, limit=100)
    assert all(window[0] == model.tokenizer.bos_token_id for window in cut.ids)
    assert max(map(len, cut.ids)) == 20
    joined = [token for window in cut.ids for token in window[1:]]
    assert joined == model.to_tokens(given, prepend_bos=False, truncate=False)[0].tolist()
    assert cut.left_out == ""
    assert text.windows(model, given).ids[0] == model.to_tokens(given)[0].tolist()[: models.N_CTX]


@pytest.mark.parametrize(
    ("given", "options", "n_bos"),
    [
        ("a cat", [], 1),
        ("a cat", ["--prepend-bos"], 1),
        ("a cat", ["--no-prepend-bos"], 0),
        ("<bos>a cat", [], 1),
        ("<bos>a cat", ["--prepend-bos"], 2),
        ("<bos>a cat", ["--no-prepend-bos"], 1),
    ],
)
def test_a_text_begins_as_asked(
    run: Run, gpt2_dir: str, seen: dict[str, Any], given: str, options: list[str], n_bos: int
) -> None:
    _refused(run("probe", gpt2_dir, "--text", given, *options), "enough")
    bos, (ids,) = 0, seen["tokens"]
    assert ids[:n_bos] == [bos] * n_bos
    assert bos not in ids[n_bos:]
    assert len(ids) == n_bos + len("a cat")


def test_messages_are_written_by_the_template(
    run: Run, gpt2_dir: str, tmp_path: Path, seen: dict[str, Any]
) -> None:
    tokenizer = characters()
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    models.tiny_hf(GPT2LMHeadModel, models.tiny_gpt2_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chats = [[{"role": "user", "content": said}] for said in ("a cat", "sat")]
    wanted = [tokenizer(f"<bos>{said}.")["input_ids"] for said in ("a cat", "sat")]
    for given, ids in ((chats, wanted), (chats[0], wanted[:1])):
        file = tmp_path / "chat.json"
        file.write_text(json.dumps(given), encoding="utf-8")
        argv = ["probe", str(tmp_path), "--messages", str(file)]
        _refused(run(*argv), "enough")
        assert seen["tokens"] == ids
    _refused(run(*argv, "--length", "9"), "--length: wanted none beside --messages; got 9")
    _refused(run(*argv, "--prepend-bos"), "--prepend-bos: wanted none beside --messages; got True")
    file.write_text('[{"content": "a cat"}]', encoding="utf-8")
    _refused(run(*argv), "messages: wanted a list of messages with role and content")
    file.write_text("a cat", encoding="utf-8")
    _refused(run(*argv), "--messages: wanted a file of JSON")
    file.write_text(json.dumps(chats), encoding="utf-8")
    _refused(run("probe", gpt2_dir, "--messages", str(file)), "template")
    _refused(run("probe", "--messages", str(file)), "--messages: wanted a model of language")


def test_a_file_and_standard_input_and_text_are_the_same(
    run: Run,
    gpt2_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: dict[str, Any],
) -> None:
    (tmp_path / "story.txt").write_text(PROSE, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROSE))
    read = []
    for given in (["--text", PROSE], ["--file", str(tmp_path / "story.txt")], ["--file", "-"]):
        _refused(run("probe", gpt2_dir, *given), "enough")
        read.append(seen["tokens"])
    assert read[0] == read[1] == read[2]
    assert sum(map(len, read[0])) == len(PROSE) + 2  # a window for 63 characters, with bos


def test_the_built_in_passage_is_long_enough_and_named(run: Run, gpt2_dir: str) -> None:
    code, out, err = run("probe", gpt2_dir, *QUICK, "--prompts", "2", "--no-sinks")
    assert code == 0
    assert "of the built-in passage (Pride and Prejudice, chapter 1)" in out
    assert "sinks left out" in out.split("Most fragile rows")[1].splitlines()[0]
    assert " sink " not in out.split("Most fragile rows")[1]
    assert len(text.passage().split()) > 800
    assert "left out" in err


@pytest.mark.slow
def test_third_parties_are_quiet(gpt2_dir: str) -> None:
    """Nothing but what we say, on either stream of a real process."""
    argv = ["probe", gpt2_dir, *QUICK, "--text", PROSE, "--length", "30", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "qkvnorm_lens", *argv], capture_output=True, text=True, env=ALONE
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["sparse"] > 0
    assert done.stderr == ""


# -- errors ---------------------------------------------------------------------------------------


def _refused(answer: tuple[int, str, str], *words: str) -> None:
    code, out, err = answer
    assert code == 1
    assert out == ""
    assert err.startswith("qkvnorm-lens: error: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["./nowhere"], ["'./nowhere'", "addition-pre"]),
        (["a/b/c"], ["'a/b/c'"]),
        ([__file__], ["a file"]),
        ([os.path.dirname(__file__)], ["config.json"]),
        (["--sigmas", "0.9"], ["sigma", "0.9"]),
        (["--sigmas", "0.25", "--law", "gaussian"], ["0.2"]),
        (["--layers", "9"], ["9"]),
        (["--draws", "1", "--method", "sample"], ["--draws: wanted 2 or more"]),
        (["--device", "nonsense"], ["--device: ", "'nonsense'"]),
        (["--device", "cuda:77"], ["--device: ", "'cuda:77'"]),
        (["--split", "huge"], ["'huge'", "small-train"]),
        (["--length", "5"], ["--length"]),
        (["--text", ""], ["text"]),
        (["--text", "[1+2=\nwhat"], ["line 2"]),
        (["--text", "[1+2=*"], ["line 1"]),
        (["--text", "1+2="], ["line 1"]),
        (["--text", "[" + 40 * "1"], ["line 1", "32"]),
        (["--text", "["], ["2 tokens"]),
        (["--text", __file__], ["--file"]),
        (["--file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--file", sys.executable], ["UTF-8"]),
        (["--out", __file__], ["--out: wanted a directory; got the file"]),
        (["--out", __file__ + "/below"], ["--out: wanted a directory; got the file"]),
        (["--file", os.path.dirname(__file__)], ["--file: wanted a file of UTF-8 text"]),
        (["addition-per"], ["MODEL: wanted ", "(did you mean 'addition-pre'?)"]),
        (["--split", "smal-train"], ["--split: wanted ", "(did you mean 'small-train'?)"]),
        (["--sigmas", "0.2,0.1"], ["--sigmas: wanted ascending"]),
    ],
)
def test_expected_errors_are_one_line(run: Run, argv: list[str], words: list[str]) -> None:
    _refused(run("probe", *argv), *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--text", "  \n"], ["text", "empty"]),
        (["--length", "65"], ["64"]),
        (["--split", "small-train"], ["addition model"]),
    ],
)
def test_expected_errors_of_language_models(
    run: Run, gpt2_dir: str, argv: list[str], words: list[str]
) -> None:
    _refused(run("probe", gpt2_dir, *argv), *words)


def test_an_unsupported_family_is_refused_by_name(run: Run, mamba_dir: str) -> None:
    _refused(run("probe", mamba_dir, "--text", PROSE), "attention", "no attention layer")


@pytest.mark.parametrize("name", ["some/model", "unheard-of", "bert-base-uncased"])
def test_an_id_that_is_not_cached_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    answer = run("probe", name)
    _refused(answer, f"'{name}'", "path/to/model", "save_pretrained", "addition-pre")


def test_a_directory_that_lacks_weights_or_tokenizer(
    run: Run, gpt2_dir: str, tmp_path: Path
) -> None:
    config = (Path(gpt2_dir) / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    _refused(run("probe", str(tmp_path)), "model.safetensors")
    weights = (Path(gpt2_dir) / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    _refused(run("probe", str(tmp_path)), "tokenizer")
    (tmp_path / "config.json").write_text("{")
    _refused(run("probe", str(tmp_path)), "config.json", "JSON")


def test_an_error_can_be_traced(run: Run) -> None:
    with pytest.raises(ValueError, match="sigma"):
        run("probe", "--sigmas", "0.9", "--traceback")


def test_interrupted_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hooks, "collapse_probe", interrupted)
    assert run(*SUMS) == (130, "", "qkvnorm-lens: interrupted\n")


def test_too_little_memory_says_what_helps(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(hooks, "collapse_probe", full)
    _refused(run(*SUMS), "out of memory", "--batch-size")


def test_a_terminal_without_the_characters_still_gets_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert main(SUMS) == 0
    assert b"\\xb1" in plain.buffer.getvalue()  # the plus-minus sign


def test_a_reader_that_stops_is_no_error() -> None:
    argv = [sys.executable, "-m", "qkvnorm_lens", "models", "--json"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (0, b"")


# -- gpt2, by its name, offline -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_model
def test_probe_gpt2_end_to_end_offline(gpt2_hub_cache: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("qkvnorm-lens")
    argv = ["probe", "gpt2", "--json", "--out", str(tmp_path), "--length", "64", "--prompts", "2"]
    done = subprocess.run(
        [command, *argv, *QUICK],
        capture_output=True,
        text=True,
        env={**ALONE, "HF_HUB_CACHE": str(gpt2_hub_cache), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1  # what was left out
    told = json.loads(done.stdout)
    report = hooks.CollapseReport.load(tmp_path / "report.safetensors")
    assert report.n_sparse > 1000
    assert told["model"]["name"] == "gpt2"
    assert told["rates"][-1]["loose"] == report.to_frame("model")["loose"].iloc[-1] > 0
    assert report.tokens[0][:4] == ("<|endoftext|>", "It", " is", " a")
