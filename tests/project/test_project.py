"""The project itself: names, versions, imports, and the helpers that other tests stand on."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError, install_import_hook

from qkvnorm_lens.cli import main
from qkvnorm_lens.models.shipped import checkpoint_card, checkpoints
from tests.support import models, real_models
from tests.support.paths import ROOT
from tests.support.watching import shape_checks_off


def _modules_after(*imports: str) -> set[str]:
    """The modules that a fresh interpreter holds after these imports."""
    code = f"import json, sys, {', '.join(imports)}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_versions_agree() -> None:
    import qkvnorm_lens

    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared
    assert importlib.metadata.version("qkvnorm-lens") == declared[1]
    assert qkvnorm_lens.__version__ == declared[1]


def test_the_entry_point_is_found_by_transformer_lens() -> None:
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    from qkvnorm_lens.models.config import ARCHITECTURE

    (entry,) = importlib.metadata.entry_points(group="transformer_lens.architectures")
    ArchitectureAdapterFactory.discover_entry_points()  # a failure there is a warning: an error
    assert ArchitectureAdapterFactory._adapters[ARCHITECTURE] is entry.load()


def test_the_command_line_starts_without_torch() -> None:
    assert not {"torch", "transformer_lens"} & _modules_after("qkvnorm_lens.cli")


def test_hooks_leaves_plotting_alone() -> None:
    loaded = _modules_after("hooks")
    assert not {"matplotlib", "plotly", "circuitsvis", "qkvnorm_lens"} & loaded


def test_the_installed_command_answers_help() -> None:
    command = Path(sys.executable).with_name("qkvnorm-lens")
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "probe" in done.stdout


@pytest.mark.parametrize(
    ("file", "call"), [("README.md", r"^\s*(?:\$ )?make ([\w-]+)"), (".ci/run", r"^step ([\w-]+)")]
)
def test_named_make_targets_exist(file: str, call: str) -> None:
    named = set(re.findall(call, (ROOT / file).read_text(), re.M))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named
    assert named <= targets


def test_the_training_guide_has_the_numbers_of_the_cards() -> None:
    table = (ROOT / "docs/training.md").read_text().partition("\n## Shipped models\n")[2]
    for name in checkpoints():
        for i, (kind, got) in enumerate(checkpoint_card(name)["accuracy"].items()):
            cells = [f"{got[key]:.2%}" for key in ("per_token", "per_token_without_end", "exact")]
            row = " | ".join([f"| `{name}`" if i == 0 else "| ", kind, *cells])
            assert f"\n{row} |\n" in table


@pytest.mark.slow
def test_the_readme_shows_what_the_probe_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = (ROOT / "README.md").read_text().partition("`make probe` prints")[2]
    block = re.findall(r"^    (.+)$", shown.partition("\n## ")[0], re.M)
    assert main(["probe"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(block) == 8
    assert [line for line in block if line not in printed] == []


@pytest.mark.parametrize("kind", models.TINY)
def test_tiny_models_have_sparse_rows(kind: str) -> None:
    model = models.TINY[kind]()
    _, cache = model.run_with_cache(models.tokens())
    for layer in range(model.cfg.n_layers):
        best = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, 1:].amax(-1)
        assert (best >= 0.95).float().mean() >= 0.1


@pytest.mark.parametrize("kind", models.TINY)
def test_tiny_models_are_reproducible_and_leave_the_random_state(kind: str) -> None:
    before = torch.get_rng_state()
    first, second = models.TINY[kind](seed=1), models.TINY[kind](seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(models.tokens()), second(models.tokens()))
    assert not torch.equal(first(models.tokens()), models.TINY[kind](seed=2)(models.tokens()))


@pytest.mark.parametrize("package", ["hooks", "qkvnorm_lens"])
def test_shapes_are_checked_in(package: str) -> None:
    loader = importlib.import_module(package).__loader__
    assert type(loader).__module__ == "jaxtyping._import_hook"


def test_wrong_shapes_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the import hook of conftest does to a module."""
    (tmp_path / "shape_probe.py").write_text(
        "from jaxtyping import Float\n"
        "from torch import Tensor\n"
        "def same(a: Float[Tensor, 'n'], b: Float[Tensor, 'n']) -> None: ...\n"
        "def first(a: Float[Tensor, 'n']) -> Float[Tensor, 'n']: same(a[:1], a[:1]); return a[:1]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with install_import_hook("shape_probe", "beartype.beartype"):
        probe = importlib.import_module("shape_probe")
    probe.same(torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeCheckError):
        probe.same(torch.zeros(2), torch.zeros(3))
    assert len(probe.first(torch.ones(1))) == 1
    with pytest.raises(TypeCheckError, match="return"):
        probe.first(torch.ones(2))  # the call within it has a size of its own, 1
    with shape_checks_off():
        assert len(probe.first(torch.ones(2))) == 1


@pytest.mark.real_model
def test_smollm2_speaks_english(smollm2, prompts) -> None:  # type: ignore[no-untyped-def]
    text = smollm2.generate(
        "The capital of France is", max_new_tokens=1, do_sample=False, verbose=False
    )
    assert text == "The capital of France is Paris"
    assert all(smollm2.to_tokens(p).shape[1] > 128 for p in prompts)


@pytest.mark.slow
@pytest.mark.real_model
def test_gpt2_loads_by_its_name_offline(gpt2_hub, prompts) -> None:  # type: ignore[no-untyped-def]
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers("gpt2")
    assert model.to_str_tokens("to the store") == ["<|endoftext|>", "to", " the", " store"]
    lengths = [model.to_tokens(p).shape[1] for p in prompts]
    assert len(lengths) == 8
    assert min(lengths) > 128
    tokens = torch.cat([model.to_tokens(p)[:, :128] for p in prompts[:2]])
    _, cache = model.run_with_cache(tokens)
    best = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"].amax(-1) for i in range(12)])
    assert (best[..., 1:] >= 0.95).float().mean() > 0.3


def test_missing_real_models_fail_by_name(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from tests.conftest import built

    monkeypatch.setenv("QKVNORM_LENS_CACHE", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="make real-model"):
        built(real_models.smollm2_path())


@pytest.mark.real_model
def test_tiny_models_take_a_tokenizer(gpt2_hub_cache) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_models.gpt2_tokenizer_path())
    model = models.tiny_gpt2(tokenizer=tokenizer)
    assert model.to_str_tokens("to the store", prepend_bos=False) == ["to", " the", " store"]
    assert model("to the store").shape[-1] == len(tokenizer)
