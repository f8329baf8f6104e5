"""TransformerLens 4 has no HookedTransformer: the module says so when it is used.

What it does on 3.9 is in tests/legacy, which `make test-legacy` runs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qkvnorm_lens.models import hooked_transformer  # a warning here is an error
from qkvnorm_lens.models.config import named_config
from qkvnorm_lens.models.model import QKVNormTransformer
from qkvnorm_lens.models.shipped import checkpoint_path


@pytest.mark.parametrize(
    "use",
    [
        lambda: hooked_transformer.to_hooked_transformer(
            QKVNormTransformer(named_config("study", "qkv"))
        ),
        lambda: hooked_transformer.from_pretrained(checkpoint_path()),
        lambda: hooked_transformer.hooked_config(named_config("study", "qkv")),
    ],
)
def test_using_it_says_which_version_it_needs(use: Callable[[], object]) -> None:
    assert not hooked_transformer.AVAILABLE
    with pytest.raises(ImportError, match=r"needs transformer-lens 3\.9.*got 4.*to_bridge"):
        use()
