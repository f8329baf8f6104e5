"""One name for every model: a shipped one, a directory, or a Hugging Face id."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qkvnorm_lens.arguments import brief, near
from qkvnorm_lens.models.cards import LoadError, read_object
from qkvnorm_lens.models.shipped import (
    DEFAULT,
    checkpoint_path,
    checkpoints,
    experiment_models,
    how_to_get,
    is_experiment_model,
)

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge


_OURS = "QKVNormTransformer"  # config.ARCHITECTURE, without importing torch
_HOW = (
    "a local directory works without a network: `qkvnorm-lens probe path/to/model`, holding "
    "config.json, the weights and the tokenizer as save_pretrained writes them (where there is a "
    "network: `hf download ID --local-dir path/to/model`)"
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``ours`` and ``directory`` have a path, ``hub`` has none."""

    name: str
    kind: Literal["ours", "directory", "hub"]
    path: Path | None = None


def find(name: str) -> Source:
    """What a name refers to: a shipped model first, then a directory, then a hub id.

    Reads no weights and imports neither torch nor TransformerLens.

    Raises:
        LoadError: a path that is not a model directory, or a model of the experiments that is not
            here.
    """
    if isinstance(name, os.PathLike):
        name = os.fspath(name)
    if not isinstance(name, str):
        raise TypeError(f"name: wanted a model's name or directory; got {brief(name)}")
    if name in checkpoints():
        return Source(name, "ours", checkpoint_path(name))
    if name in (known := experiment_models()):
        return Source(name, "ours", known[name])
    path = _path(name)
    if is_experiment_model(name) and (path is None or not path.is_dir()):
        raise LoadError(
            f"model: wanted one that is here; got {brief(name)}, one of the experiments' models: "
            f"{how_to_get(name)}"
        )
    if path is None or not path.is_dir():
        a_path = path is None or path.exists() or name.startswith((".", "~")) or path.is_absolute()
        if path is None or a_path or not name.strip() or len(path.parts) > 2:
            what = "a file" if path is not None and path.is_file() else "none of these"
            raise LoadError(
                f"model: wanted one of {checkpoints()}, a directory or a Hugging Face id; got "
                f"{brief(name)}, which is {what}{_near(name)}"
            )
        return Source(name, "hub")
    if not (path / "config.json").is_file():
        raise LoadError(
            f"model: wanted a directory with config.json, which save_pretrained writes; got {path}"
        )
    ours = read_object(path / "config.json").get("architecture") == _OURS
    return Source(name, "ours" if ours else "directory", path)


def _path(name: str) -> Path | None:
    """The name as a path; None if no file can have this name."""
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long; no such user's home; a null character
        return None
    return path


def _near(name: str) -> str:
    """The name of the model of ours that may have been meant."""
    return near(name, [*checkpoints(), *experiment_models()])


def load_model(
    name: str = DEFAULT,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> TransformerBridge:
    """A model by name, in eval mode, with attention that shows its scores and pattern.

    Args:
        name: a shipped model (see :func:`qkvnorm_lens.models.checkpoints`) or one of the
            experiments' (``study-pre-1``), a directory that ``save_pretrained`` wrote (of ours or
            Hugging Face's), or a Hugging Face id.
        device: default: an accelerator that TransformerLens trusts, else the CPU.
        dtype: default: as saved for our models, float32 for others.

    Raises:
        LoadError: no such model, or it can't be loaded.
    """
    from hooks.arguments import check_device, check_dtype

    source = find(name)
    device, dtype = check_device("device", device), check_dtype("dtype", dtype)
    from transformer_lens.utilities.devices import get_device

    where = device if device is not None else get_device()
    try:
        with _quiet():
            return _load(source, where, dtype)
    except LoadError:
        raise
    except Exception as error:  # third parties raise whatever they like
        raise LoadError(_why(source, error)) from error


def _load(source: Source, device: Any, dtype: torch.dtype | None) -> TransformerBridge:
    if source.kind == "ours":
        from qkvnorm_lens.models.bridge import from_pretrained

        assert source.path is not None
        ours = from_pretrained(source.path, device=device, dtype=dtype, attn_implementation="eager")
        ours.cfg.model_name = source.name
        return ours
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    given = source.name if source.path is None else str(source.path)
    model: TransformerBridge = TransformerBridge.boot_transformers(
        given, device=device, dtype=torch.float32 if dtype is None else dtype
    )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bar for weights, no messages on retries or old names; warnings on weights stay."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    root, hub = logging.getLogger(), logging.getLogger("huggingface_hub")
    level = hub.level
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    root.addFilter(_not_an_old_name)
    try:
        yield
    finally:
        root.removeFilter(_not_an_old_name)
        hub.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _not_an_old_name(record: logging.LogRecord) -> bool:
    """Accept TransformerLens's own aliases, such as gpt2-small, without a warning."""
    return not record.getMessage().startswith("DEPRECATED: You are using a deprecated, model_name")


def _why(source: Source, error: Exception) -> str:
    """One line: what was requested and why it failed."""
    if source.kind == "hub" and _unreachable(error):
        return (
            f"model: wanted a shipped model ({', '.join(checkpoints()) or 'none'}), a directory or "
            f"a Hugging Face id; got {brief(source.name)}{_near(source.name)}, which is none of "
            "ours and no directory here; the Hugging Face cache does not hold it and the hub can't "
            f"be reached. {_HOW[0].upper()}{_HOW[1:]}"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    if said.endswith(":"):  # of a list that follows
        said = " ".join(lines)
    said = f"{said}{_near(source.name) if source.kind == 'hub' else ''}"
    return f"model: wanted one that can be loaded; got {brief(source.name)}: {said}"


def _unreachable(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
            return True
        error = error.__cause__ or error.__context__
    return False
