"""The verdict on a model's cached steps."""

from __future__ import annotations

from dataclasses import dataclass

from hooks.errors import UnsupportedModelError

_ADVICE = "pass use_past_kv_cache=False (use_cache=False to a Hugging Face model)"


@dataclass(frozen=True)
class CachedSteps:
    """Why no cached step is trusted, or none of several tokens; "" where all are."""

    wrong: str = ""
    several_wrong: str = ""

    def refuse(self, cached: int, new: int | None) -> None:
        """Raise where a step with ``new`` tokens after ``cached`` ones would be wrong."""
        if self.wrong:
            raise UnsupportedModelError(
                "generate with a cache",
                wanted="cached steps that give what the whole pass gives",
                got=f"{self.wrong}; {_ADVICE}",
            )
        if self.several_wrong and cached and new != 1:
            raise UnsupportedModelError(
                "a cached step of several tokens",
                wanted="what the whole pass gives",
                got=f"{self.several_wrong}; pass one new token at a time, or {_ADVICE}",
            )
