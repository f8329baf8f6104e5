"""Docstrings as Markdown.

The roles :func:`name`, :class:`name`, ... become links, ``w_*`` keeps its star, and an entry for
several parameters or attributes ("q, k: ...") becomes one for each; the columns of a frame become
a list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")
_SECTION = re.compile(r"(?:Args|Attributes|Raises|Returns|Example):\s*$")
_SEVERAL = re.compile(r"    (\w+(?:, \w+)+): (.*)$")
_CODE = re.compile(r"(``.+?``|`.+?`)")


class Roles(griffe.Extension):
    """Turns each role into a link to what it names, or into plain code where that is not shown."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite every docstring of one package."""
        self._visit(pkg)
        for name in pkg.exports or ():
            # A function that hides the module it comes from, as hooks.spread does.
            module = pkg.members.get(str(name))
            if module is not None and module.is_module and str(name) in module.members:
                pkg.members[str(name)] = griffe.Alias(str(name), module[str(name)], parent=pkg)

    def _visit(self, thing: griffe.Object) -> None:
        if thing.docstring is not None:
            thing.docstring.value = _markdown(thing.docstring.value, thing)
        for member in thing.members.values():
            if not member.is_alias:
                self._visit(member)


def _markdown(docstring: str, thing: griffe.Object) -> str:
    out = []
    in_section = False
    for line in _each_alone(_columns(docstring.splitlines())):
        in_section = in_section or bool(_SECTION.match(line))
        equation = line.startswith("    ") and not in_section
        out.append(line if equation else _escaped(line))
    return _ROLE.sub(lambda role: _link(role[1], thing), "\n".join(out))


def _escaped(line: str) -> str:
    """The line with the stars escaped that are not in code."""
    name = re.match(r"    \*+(?=\w)", line)  # **fields: the name of a parameter
    start = name.end() if name else 0
    parts = _CODE.split(line[start:])
    parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
    return line[:start] + "".join(parts)


def _each_alone(lines: list[str]) -> list[str]:
    """Entries such as "q, k, v: vector sites" as one for q, and two that point to it."""
    out: list[str] = []
    inside, pending = False, []
    for line in lines:
        if _SECTION.match(line):
            inside = line.startswith(("Args", "Attributes"))
        if pending and not line.startswith(" " * 8):  # the entry is over
            out += pending
            pending = []
        several = _SEVERAL.match(line) if inside else None
        if several is None:
            out.append(line)
            continue
        first, *others = several[1].split(", ")
        out.append(f"    {first}: {several[2]}")
        pending = [f"    {name}: see ``{first}``." for name in others]
    return out + pending


def _columns(lines: list[str]) -> list[str]:
    """The section on a frame's columns as a list."""
    if "Columns:" not in lines:
        return lines
    start = lines.index("Columns:")
    end = start + 1
    while end < len(lines) and (not lines[end] or lines[end].startswith("    ")):
        end += 1
    out = ["__Columns__", ""]
    for line in lines[start + 1 : end]:
        entry = re.match(r"    (\w+(?:, \w+)*|\w+[\w., ]*\(.+?\)): (.*)$", line)
        if entry is not None:
            out.append(f"- ``{entry[1]}``: {entry[2]}")
        else:
            out.append(f"  {line.strip()}" if line.startswith(" " * 8) else line.strip())
    return [*lines[:start], *out, "", *lines[end:]]


def _link(name: str, thing: griffe.Object) -> str:
    """Markdown for a name as it is written in the docstring of ``thing``."""
    for target in _candidates(name, thing):
        package, _, rest = target.partition(".")
        if package == thing.package.name and _is_shown(thing.package, rest):
            return f"[`{name.rpartition('.')[2]}`][{_public(target)}]"
    return f"`{name}`"


def _candidates(name: str, thing: griffe.Object) -> list[str]:
    """Full paths that the name may stand for, the nearest scope first."""
    paths = [name]
    owner: griffe.Object | None = thing
    while owner is not None:
        paths.append(f"{owner.path}.{name}")
        owner = owner.parent
    return paths


def _is_shown(package: griffe.Module, rest: str) -> bool:
    try:
        found = package[rest] if rest else package
        if found.is_alias:
            found = found.final_target
    except (KeyError, griffe.AliasResolutionError):
        return False
    return not found.is_module and (found.docstring is not None or not found.is_attribute)


def _public(path: str) -> str:
    """hooks.collapse.KeptRows is shown as hooks.KeptRows, and so are all names of that package."""
    return re.sub(r"^hooks\.(?:[a-z_]\w*\.)+(?=\w)", "hooks.", path)
