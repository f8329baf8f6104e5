"""Errors of this package: each names what was wanted and what was got."""

from __future__ import annotations

from pathlib import Path


class UnsupportedModelError(ValueError):
    """A model for which no number would be trustworthy.

    Raised instead of a result when the self-check of :func:`hooks.attention_sites` fails on a
    model, or cannot decide. The message names the layer, the check, what was wanted and what
    was got.

    Args:
        check: the check that failed, for example ``"k-noise predicted from clean scores"``.
        wanted: what a supported model does.
        got: what this model did.
        layer: block index, or None for the whole model.
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


class ReportFileError(ValueError):
    """A file that is not a whole report of the requested kind.

    Raised by every report's ``load``: the file is not a report, was cut or changed, is of another
    kind or version, or its arrays do not fit its settings. Then nothing is loaded.

    Args:
        path: the file.
        field: which part: ``header``, ``settings.sigmas``, ``table.start``, ``digest``, ...
        wanted: what a whole report has there.
        got: what this file has.
    """

    def __init__(self, path: str | Path, field: str, *, wanted: str, got: str) -> None:
        self.path = str(path)
        self.field = field
        self.wanted = wanted
        self.got = got
        super().__init__(f"{path}: {field}: wanted {wanted}; got {got}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_file, (self.path, self.field, self.wanted, self.got)


def _rebuild_file(path: str, field: str, wanted: str, got: str) -> ReportFileError:
    return ReportFileError(path, field, wanted=wanted, got=got)


def _rebuild(check: str, wanted: str, got: str, layer: int | None) -> UnsupportedModelError:
    return UnsupportedModelError(check, wanted=wanted, got=got, layer=layer)
