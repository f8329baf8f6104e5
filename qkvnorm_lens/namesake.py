"""The package `hooks` by a name that nobody else has: ``qkvnorm_lens.hooks``; and its namesakes.

A folder named ``hooks`` in a user's project comes before the installed package on ``sys.path``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "qkvnorm_lens.hooks"


def check_hooks() -> None:
    """Refuse another package or module named ``hooks`` in the place of ours.

    Raises:
        ImportError: says which file is in the way, and what to do.
    """
    ours = Path(__file__).parent.parent / "hooks" / "__init__.py"
    found = sys.modules.get("hooks")
    spec = importlib.util.find_spec("hooks") if found is None else found.__spec__
    origin = getattr(found, "__file__", None) or (None if spec is None else spec.origin)
    if not isinstance(origin, str) or not ours.exists() or Path(origin).resolve() == ours.resolve():
        return
    raise ImportError(
        f"hooks: wanted the package that comes with qkvnorm-lens ({ours.parent}); got {origin}, "
        "which comes first on sys.path: rename it, or start Python elsewhere (the command "
        "qkvnorm-lens does not look into the current folder; python -m qkvnorm_lens does)"
    )


class _Alias(MetaPathFinder, Loader):
    """``qkvnorm_lens.hooks`` and what is below it: the modules of ``hooks`` themselves."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Of names that are ours alone."""
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        real = fullname.removeprefix("qkvnorm_lens.")
        found = importlib.util.find_spec(real)
        if found is None:
            return None
        package = found.submodule_search_locations is not None
        return ModuleSpec(fullname, self, is_package=package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its own name; its spec is set to the alias's on the way."""
        module = importlib.import_module(spec.name.removeprefix("qkvnorm_lens."))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run; give it back its own spec."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def provide() -> None:
    """Make ``import qkvnorm_lens.hooks`` possible, once."""
    if not any(isinstance(finder, _Alias) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Alias())  # the path of the package would give copies
