"""Errors of this package: each names what was wanted and what was got."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A model for which no number can be trusted.

    Raised instead of a result when the self-check of :func:`hooks.attention_sites` fails on a
    model, or cannot decide. The message names the layer, the check, what was wanted and what
    was got.

    Args:
        check: the check that failed, for example ``"k-noise predicted from clean scores"``.
        wanted: what a supported model does.
        got: what this model did.
        layer: block index, or None where the whole model is meant.
    """

    def __init__(self, check: str, *, wanted: str, got: str, layer: int | None = None) -> None:
        self.check = check
        self.wanted = wanted
        self.got = got
        self.layer = layer
        where = "the model" if layer is None else f"layer {layer}"
        super().__init__(f"{where}: {check}: wanted {wanted}; got {got}")

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call __init__ with the message alone.
        return _rebuild, (self.check, self.wanted, self.got, self.layer)


def _rebuild(check: str, wanted: str, got: str, layer: int | None) -> UnsupportedModelError:
    return UnsupportedModelError(check, wanted=wanted, got=got, layer=layer)
