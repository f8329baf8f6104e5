"""The Triton engine under its interpreter on every architecture of the support table.

    make test-triton ARGS=--collect-only  # makes the environment
    TRITON_INTERPRET=1 .venv-triton/bin/python -m tests.support.triton_checks

compares it with the compiled code, and prints a line for each architecture that differs. Not under
pytest, as it takes long; behind it ``0 2`` and ``1 2`` take every other one.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

from hooks import attention_sites, collapse_probe
from tests.support import builders, matrix
from tests.support.engines import assert_same


def architectures(part: str = "0", parts: str = "1") -> int:
    """How many architectures differ, of those that are verified or limited, every n-th of them."""
    rows = [row for row in matrix.stored().values() if row.verdict in ("verified", "limited")]
    differing = 0
    for row in tqdm(rows[int(part) :: int(parts)]):
        built = builders.build(row.name, row.heads or None)
        (tokens,), rest = built.inputs(batch=1, pos=9)
        how: dict[str, Any] = {"sparse": 0.55, "sigmas": (0.05, 0.5), "keep": 1000}
        if rest:
            how["decoder_tokens"] = rest["decoder_input_ids"]
        try:
            capped = any(sites.soft_cap > 0 for sites in attention_sites(built.model))
            how["strict"] = not capped  # which the compiled code alone has there
            each = [
                collapse_probe(built.model, tokens, engine=engine, progress=False, **how)
                for engine in ("triton", "compiled")
            ]
            assert each[0].model["engine"] == "triton"
            assert_same(*each, strict=None if capped else 1e-6)
        except Exception as error:  # the others are compared all the same
            differing += 1
            tqdm.write(f"{row.name} {row.heads}: {type(error).__name__}: {error}"[:300])
    print(f"{len(rows)} architectures, {differing} differ")
    return differing


if __name__ == "__main__":
    sys.exit(bool(architectures(*sys.argv[1:])))
