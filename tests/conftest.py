"""What every test needs before the package is imported, and the fixtures that tests share."""

from __future__ import annotations

import os

# Read by huggingface_hub and transformers once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.support import shape_checks

shape_checks.install()

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import compiling, models, real_models
from tests.support.watching import one_thread

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

collect_ignore = ["legacy", "caches", "triton"]  # each has an environment of its own

torch.set_num_threads(1)  # the quadrature's many small operations lose by more

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", parent=settings.get_profile("default"), derandomize=False)
settings.load_profile("default")  # others with --hypothesis-profile


# Files that take long, first: or one process is busy with them while the others have no more to do.
LONG = ("tests/fuzz/", "tests/qkvnorm_lens/experiments/", "tests/project/test_docs.py")


def pytest_configure(config: pytest.Config) -> None:
    """Before there are several processes that would each compile the kernels."""
    if config.getoption("numprocesses", None) and not config.getoption("collectonly"):
        compiling.compile_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def built(path: Path) -> Path:
    if not path.exists():
        pytest.fail(f"{path} is missing: `make real-model` builds it", pytrace=False)
    return path


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Whatever a test before it set."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    return built(real_models.smollm2_path())


@pytest.fixture(scope="session")
def _smollm2(smollm2_dir: Path) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(smollm2_dir))


@pytest.fixture
def smollm2(_smollm2: TransformerBridge) -> Iterator[TransformerBridge]:
    """SmolLM2-135M-Instruct, loaded once; a test that leaves hooks behind fails."""
    yield _smollm2
    left = [name for name, point in _smollm2.hook_dict.items() if point.has_hooks()]
    _smollm2.reset_hooks()
    assert not left, f"the test left hooks on {left}"


@pytest.fixture(scope="session")
def gpt2_hub_cache() -> Path:
    """A directory for `HF_HUB_CACHE` in which "gpt2" is a random model with the real tokenizer."""
    return built(real_models.gpt2_hub_path())


@pytest.fixture
def gpt2_hub(gpt2_hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and this process reads it: `boot_transformers("gpt2")` works in the test."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", str(gpt2_hub_cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(gpt2_hub_cache))
    return gpt2_hub_cache


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Eight passages of real English, each more than 128 tokens long."""
    return models.shakespeare()
