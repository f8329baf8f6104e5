"""What broke with the versions that are installed, beside those that the tests ran with.

    python -m tests.support.newest [--out DIR] [--marks "not slow and ..."] [TESTS ...]

Runs the tests in this environment and writes `DIR/newest.md`: which packages differ from
`constraints.txt`, and every test that failed, by file. Exit status 1 if one did.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.support.paths import ROOT

FAST = "not slow and not long and not browser and not notebooks"


def pinned() -> dict[str, str]:
    """Versions in `constraints.txt`, those for this Python."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def differing(wanted: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(package, pinned, installed) of those that are installed in another version."""
    rows = []
    for name, pin in wanted.items():
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        if here.split("+")[0] != pin:
            rows.append((name, pin, here))
    return rows


def failures(junit: Path) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """How many tests ran, and those that failed: by file, (name, first line of the message)."""
    by_file: dict[str, list[tuple[str, str]]] = defaultdict(list)
    cases = [*ET.parse(junit).iter("testcase")]
    for case in cases:
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                first = (found.get("message") or kind).splitlines()[0]
                place = case.get("classname", "").replace(".", "/")
                by_file[place].append((case.get("name", ""), first[:200]))
    ran = sum(case.find("skipped") is None for case in cases)
    return ran, dict(by_file)


def as_markdown(
    rows: Iterable[tuple[str, str, str]], ran: int, failed: Mapping[str, list[tuple[str, str]]]
) -> str:
    """The report."""
    count = sum(map(len, failed.values()))
    lines = [
        f"# Python {platform.python_version()}: {ran} tests ran, {count} failed",
        "",
        "| package | pinned | installed |",
        "|---|---|---|",
        *(f"| {name} | {pin} | {here} |" for name, pin, here in rows),
    ]
    for place, cases in sorted(failed.items()):
        lines += ["", f"## {place}", ""]
        lines += [f"- `{name}`: {message}" for name, message in cases]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "newest")
    parser.add_argument("--marks", default=FAST)
    parser.add_argument("tests", nargs="*")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    junit = args.out / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--maxprocesses", "8"]
    command += ["-m", args.marks, f"--junitxml={junit}", *args.tests]
    junit.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, check=False)
    if not junit.exists():  # nothing could even be collected
        return 1
    ran, failed = failures(junit)
    text = as_markdown(differing(pinned()), ran, failed)
    (args.out / "newest.md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
