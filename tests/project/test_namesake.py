"""`hooks` is a common name: another one is refused, and ours has a name that nobody else has."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In a new interpreter that looks into its folder first, as a script or a notebook does."""
    code = f"import sys; sys.path[:] = ['', *sys.path, {str(ROOT)!r}]; {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["hooks/__init__.py", "hooks.py"])
@pytest.mark.parametrize("first", ["", "import hooks; "])
def test_another_hooks_is_named(tmp_path: Path, name: str, first: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    done = run(f"{first}import qkvnorm_lens", tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: hooks: wanted the package that comes with qkvnorm-lens")
    assert f"got {tmp_path / name}" in last
    assert "rename it" in last


@pytest.mark.parametrize("there", [(), ("hooks/README",), ("hooks/other.py",)])
def test_what_does_not_come_first_is_no_matter(tmp_path: Path, there: tuple[str, ...]) -> None:
    """A folder without __init__.py gives way to a package."""
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    done = run("import qkvnorm_lens, hooks; hooks.NormNoise(sigma=0.1)", tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_safe_name_is_the_same_package(tmp_path: Path) -> None:
    """Whichever is imported first, there is one module, with its own name and spec."""
    code = """
import qkvnorm_lens
assert 'torch' not in sys.modules
import qkvnorm_lens.hooks.reports.base as base
from qkvnorm_lens.hooks.collapse import CollapseReport
import hooks.reports.base, hooks.collapse, qkvnorm_lens.hooks.noise.laws
assert qkvnorm_lens.hooks is hooks and sys.modules['qkvnorm_lens.hooks'] is hooks
assert base is hooks.reports.base and CollapseReport is hooks.CollapseReport
assert qkvnorm_lens.hooks.noise.laws is hooks.noise.laws is sys.modules['hooks.noise.laws']
aliases = [n for n in sys.modules if n.startswith('qkvnorm_lens.hooks')]
assert len(aliases) > 4
for name in aliases:
    module = sys.modules[name]
    assert module is sys.modules[name.removeprefix('qkvnorm_lens.')]
    assert module.__name__ == module.__spec__.name == name.removeprefix('qkvnorm_lens.')
assert not hasattr(base, '__path__')
"""
    done = run(f"exec({code!r})", tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_not_there_is_not_there() -> None:
    import hooks
    import qkvnorm_lens

    assert qkvnorm_lens.hooks is hooks
    assert "hooks" in dir(qkvnorm_lens)
    with pytest.raises(ModuleNotFoundError, match=r"qkvnorm_lens\.hooks\.nothing"):
        __import__("qkvnorm_lens.hooks.nothing")
    with pytest.raises(AttributeError, match="nothing"):
        qkvnorm_lens.nothing  # noqa: B018
    noise = qkvnorm_lens.hooks.NormNoise(sigma=0.1)
    assert pickle.loads(pickle.dumps(noise)) == hooks.NormNoise(sigma=0.1)
