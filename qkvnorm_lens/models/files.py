"""Our models on disk: weights with their own digest and those of the files beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from safetensors.torch import load, save
from torch import nn

from hooks.reports import TensorFile, Unsound, with_words, write_whole
from qkvnorm_lens.models.cards import LoadError, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qkvnorm_lens.models.config import QKVNormConfig

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
TOKENIZER: Final = "tokenizer.json"
_BESIDE: Final = (TOKENIZER, "tokenizer_config.json")
_CHOICES: Final = ("attn_implementation",)  # of a configuration: how, not what
T = TypeVar("T")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer.

    Raises:
        OSError: it can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raise nothing more precise, of a full disk too
        raise OSError(f"{folder}: the tokenizer could not be written: {error}") from error


def write(state: Mapping[str, torch.Tensor], values: Mapping[str, Any], folder: Path) -> None:
    """Write weights and configuration, each whole or not at all.

    The header of the weights has a digest of them, of the configuration and of the folder's
    tokenizer.

    Raises:
        OSError: they can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    weights = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    words = {"format": "pt", "digest": _of_weights(weights), CONFIG: _of_values(json.loads(text))}
    words |= {name: _of_file(folder / name) for name in _BESIDE if (folder / name).is_file()}
    write_whole(folder / WEIGHTS, with_words(save(weights), words))
    write_whole(folder / CONFIG, text.encode())


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and weights, as they were written.

    Models from before there was a digest can be read too: only the form of their files is checked.

    Raises:
        LoadError: one of the files is not what was written.
    """
    values, path = read_object(folder / CONFIG), folder / WEIGHTS
    try:
        with path.open("rb") as stream:
            words = TensorFile.open(stream).words
            stream.seek(0)
            weights = load(stream.read())
    except Unsound as error:
        raise LoadError(f"{path}: {error}") from error
    except Exception as error:  # safetensors' own
        raise LoadError(f"{path}: wanted weights; got {error}") from error
    if "digest" in words:
        _same(path, words["digest"], _of_weights(weights))
        _same(folder / CONFIG, words.get(CONFIG), _of_values(values))
        for name in _BESIDE:
            if name in words:
                _same(folder / name, words[name], _of_file(folder / name))
    elif set(words) - {"format"}:
        raise LoadError(f"{path}: digest: wanted one; got only {sorted(words)}")
    return values, weights


def made(path: Path, make: Callable[[], T]) -> T:
    """What is made from a file.

    Raises:
        LoadError: nothing can be made from it.
    """
    try:
        return make()
    except Exception as error:  # TransformerLens, torch and tokenizers raise what they like
        said = " ".join(str(error).split())[:300]
        raise LoadError(f"{path}: wanted what save_pretrained writes; got {said}") from error


def check_fits(
    path: Path,
    config: QKVNormConfig,
    weights: Mapping[str, torch.Tensor],
    kind: Callable[[QKVNormConfig], nn.Module],
) -> None:
    """Refuse a configuration that is far larger than its weights, before making the model.

    Raises:
        LoadError: it is.
    """
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if len(layers) != config.n_layers:  # modules cost memory without a weight too
        raise LoadError(
            f"{path}: wanted {config.n_layers} layers, as configured; got {len(layers)}"
        )
    with torch.device("meta"):
        wanted = made(path.parent / CONFIG, lambda: kind(config).state_dict())
    for name in sorted({*wanted, *weights}):
        if name not in weights or name not in wanted:
            got = "none" if name not in weights else "one that the configuration does not have"
            raise LoadError(f"{path}: {name}: wanted the configuration's weights; got {got}")
        if weights[name].shape != wanted[name].shape:
            got = f"{list(weights[name].shape)}"
            raise LoadError(f"{path}: {name}: wanted {list(wanted[name].shape)}; got {got}")
        if weights[name].is_floating_point() and not bool(torch.isfinite(weights[name]).all()):
            raise LoadError(f"{path}: {name}: wanted finite numbers; got NaN or infinity")


def _same(path: Path, noted: str | None, found: str) -> None:
    if noted != found:
        raise LoadError(
            f"{path}: wanted what was written with these weights; got another digest: it was "
            "changed or damaged since; take a copy, or write the model again (save_pretrained)"
        )


def _of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{hashed.hexdigest()}"


def _of_values(values: Mapping[str, Any]) -> str:
    said = {name: value for name, value in values.items() if name not in _CHOICES}
    return f"sha256:{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}"


def _of_file(path: Path) -> str:
    if not path.is_file():
        raise LoadError(f"{path}: wanted what was written with these weights; got no such file")
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
