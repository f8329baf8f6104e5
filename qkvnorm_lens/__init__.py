"""Transformers with No-Norm, Pre-Norm and QKV-Norm attention, and what norm noise does to models.

Importing this package imports neither torch nor TransformerLens: each name of ``__init__.pyi`` is
fetched from its module at first use. ``qkvnorm_lens.hooks`` is `hooks` by a safe name.
"""

from importlib import import_module
from typing import Any

import lazy_loader

from qkvnorm_lens.namesake import check_hooks, provide

__version__ = "0.1.0"

check_hooks()
provide()
_attribute, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]


def __getattr__(name: str) -> Any:
    return import_module("hooks") if name == "hooks" else _attribute(name)


def __dir__() -> list[str]:
    return [*__all__, "hooks"]
