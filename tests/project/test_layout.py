"""The house: which module may import which, read from the import statements themselves."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("hooks", "qkvnorm_lens")
# Each may import those before it.
FLOORS = {
    "hooks": (
        "errors",
        "arguments",
        "kernels",
        "reports",
        "model",
        "sites",
        "noise",
        "collapse",
        "measures",
    ),
    "qkvnorm_lens": (
        "namesake",
        "arguments",
        "theory",
        "models",
        "training",
        "text",
        "tables",
        "plots",
        "page",
        "experiments",
        "cli",
    ),
    "qkvnorm_lens.plots": ("charts", "html"),
    "qkvnorm_lens.experiments": ("core", "paper", "beyond", "related", "train", "curves"),
}
MOST_LINES = 500
MOST_OF_A_FUNCTION = 60


def modules(package: str) -> dict[str, Path]:
    """Dotted names; a folder's own is that of its face."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


EVERY = {package: modules(package) for package in PACKAGES}
KNOWN = {name for found in EVERY.values() for name in found}


@cache
def imports(name: str) -> set[str]:
    """Modules of ours that a module imports, wherever the statement stands; also in its stub."""
    path, found = EVERY[name.split(".")[0]][name], set()
    stub = path.with_suffix(".pyi")
    source = path.read_text() + (stub.read_text() if stub.exists() else "")
    here = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{path}: an import from the folder above"
            module = f"{here}.{node.module}" if node.level else str(node.module)
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= (inner & KNOWN) or {module}
    return {name for name in found if name in KNOWN}


def is_face(name: str) -> bool:
    return EVERY[name.split(".")[0]][name].name == "__init__.py"


def room(name: str) -> str:
    """The folder in which a module lies."""
    return name if is_face(name) else name.rpartition(".")[0]


def rooms() -> Iterator[tuple[str, str, int]]:
    """A floor plan's package, a module in it, and the floor on which that stands."""
    for package, floors in FLOORS.items():
        for name in sorted(KNOWN):
            if name.startswith(f"{package}."):
                part = name.removeprefix(f"{package}.").split(".")[0]
                yield package, name, floors.index(part) if part in floors else len(floors)


PLAN = {(package, name): floor for package, name, floor in rooms()}


@pytest.mark.parametrize(("package", "name"), PLAN)
def test_modules_import_what_is_below(package: str, name: str) -> None:
    for other in imports(name):
        if package == "hooks":
            assert other.startswith("hooks"), f"{name} imports {other}"
            assert other != "hooks", f"{name} imports the package's own face"
        if other == package or not other.startswith(f"{package}."):
            continue
        assert PLAN[package, other] <= PLAN[package, name], f"{name} imports {other}, from above"


def test_every_part_has_a_floor() -> None:
    """Of the two packages; in the others what has none stands on the top floor."""
    for package in PACKAGES:
        parts = {n.removeprefix(f"{package}.").split(".")[0] for n in EVERY[package]}
        assert parts - {package, "__main__"} == set(FLOORS[package])


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_nobody_imports_past_a_face(name: str) -> None:
    """A module of another folder is reached by that folder's `__init__`; top-level ones by name."""
    for other in imports(name):
        mine, theirs = room(name), room(other)
        if is_face(other) or "." not in theirs or mine == theirs:
            continue
        raise AssertionError(f"{name} imports {other}, past the face of {theirs}")


@pytest.mark.parametrize("package", PACKAGES)
def test_nobody_imports_a_private_name(package: str) -> None:
    for name, path in EVERY[package].items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                private = [a.name for a in node.names if re.match("_[^_]", a.name)]
                assert not private, f"{name} imports {private} of {node.module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package: str) -> None:
    graph = {n: imports(n) - {n} for n in EVERY[package]}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"imports in a circle: {error.args[1]}") from error


@pytest.mark.parametrize("package", PACKAGES)
def test_no_underscore_and_no_long_file(package: str) -> None:
    for name, path in EVERY[package].items():
        if name.count(".") > 1 and path.name != "__init__.py":
            assert not path.name.startswith("_"), path
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


@pytest.mark.parametrize("package", PACKAGES)
def test_no_long_function(package: str) -> None:
    """Signature and docstring apart."""
    for name, path in EVERY[package].items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= MOST_OF_A_FUNCTION, f"{name}.{node.name}: {lines}"


def test_most_files_are_short() -> None:
    lengths = [len(p.read_text().splitlines()) for found in EVERY.values() for p in found.values()]
    assert statistics.median(lengths) <= 150


def test_no_test_names_a_private_helper() -> None:
    """What tests need has a name that others may say: imports, and names of imported modules."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree, ours = ast.parse(path.read_text()), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                for alias in node.names:
                    assert not re.match("_[^_]", alias.name), f"{path} imports {alias.name}"
                    if f"{node.module}.{alias.name}" in KNOWN:
                        ours.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = re.match("_[^_]", node.attr) and node.value.id in ours
                assert not private, f"{path} names {node.value.id}.{node.attr}"
