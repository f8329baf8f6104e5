"""What an experiment is: parts that give tidy rows, and a table, a figure and words made of them.

A part is the unit of work: it is written as it ends, and a run that was stopped goes on behind the
last one. The table is the parts' rows in order, whatever was run when.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    runtime_checkable,
)

import pandas as pd

from qkvnorm_lens.experiments.core.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformer_lens.model_bridge import TransformerBridge

    from qkvnorm_lens.training import Split

Size = Literal["smoke", "quick", "full"]
Kind = Literal["addition", "language"]
SIZES: Final[tuple[Size, ...]] = ("smoke", "quick", "full")
P = ParamSpec("P")
T = TypeVar("T")


def by_size(smoke: T, quick: T, full: T) -> dict[Size, T]:
    """How much of something, by size."""
    return dict(zip(SIZES, (smoke, quick, full), strict=True))


@dataclass(frozen=True)
class Subject:
    """A model that an experiment looks at.

    Attributes:
        name: as it is called in tables.
        kind: ``"addition"`` (reads the 17 characters) or ``"language"``.
        path: its directory; None for a name on the Hugging Face hub.
        placement: ``"none"``, ``"pre"``, ``"qk"`` or ``"qkv"``; empty for other people's models.
        group: the models that differ from it by their seed alone share this name.
        seed: of its weights and data; None where it isn't known.
        digest: of its weights, configuration and tokenizer, so that results of others aren't mixed
            up; empty of a name on the hub that is not in the cache yet.
    """

    name: str
    kind: Kind
    path: Path | None
    placement: str
    group: str
    seed: int | None
    digest: str

    @cached_property
    def columns(self) -> dict[str, Any]:
        """What every row about this model begins with."""
        seed = -1 if self.seed is None else self.seed
        return {"model": self.name, "group": self.group, "placement": self.placement, "seed": seed}

    @property
    def split(self) -> Split:
        """The sums that an addition model was trained on.

        Raises:
            ValueError: its card does not say.
        """
        from qkvnorm_lens.models import find
        from qkvnorm_lens.training import trained_on

        split = trained_on(find(self.source))
        if split is None:
            raise ValueError(f"{self.name}: wanted card.json, which says what it was trained on")
        return split

    @property
    def sums(self) -> Any:
        """The same as it is written down; None of a model whose card does not say."""
        from qkvnorm_lens.models import find
        from qkvnorm_lens.training import trained_on

        split = None if self.path is None else trained_on(find(self.source))
        return None if split is None else json.loads(json.dumps(split.to_json()))

    @property
    def source(self) -> str:
        """What `load_model` is given."""
        return self.name if self.path is None else str(self.path)

    def load(self) -> TransformerBridge:
        """The model, on the CPU or an accelerator, in eval mode; the latest one is kept.

        Kept as what it is, not as where it lay: numbers of other weights, configuration or
        tokenizer would go into the results under this digest.

        Raises:
            ValueError: the directory holds another model than when this subject was made.
        """
        if latest.get("key") != (self.source, self.digest):
            from qkvnorm_lens.models import load_model

            latest.clear()  # before the next one needs the room
            self._check_unchanged()
            loaded = load_model(self.source)
            self._check_unchanged()  # while it was read
            loaded.cfg.model_name = self.name
            latest.update(key=(self.source, self.digest), model=loaded)
        model: TransformerBridge = latest["model"]
        return model

    def _check_unchanged(self) -> None:
        from qkvnorm_lens.experiments.core.digest import digest_of, digest_of_hub

        found = digest_of_hub(self.name) if self.path is None else digest_of(self.path)
        if self.path is None and "" in (found, self.digest):  # not in the cache, or not until now
            return
        if found != self.digest:
            raise ValueError(
                f"{self.source}: wanted the model of digest {self.digest}, which was there when "
                f"the run began; got {found}: another was written in its place, run again"
            )


latest: dict[str, Any] = {}


@dataclass(frozen=True)
class Part:
    """One unit of work.

    Args:
        key: names it; unique in its experiment and fit for a file name.
        work: gives its rows.
        subject: the model it is about, if it is about one.
        settings: what else its rows depend on, in JSON types.
    """

    key: str
    work: Callable[[], pd.DataFrame]
    subject: Subject | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A published statement beside ours.

    Args:
        what: what is compared, in a few words.
        published: the paper's number or statement, with its figure.
        ours: the same, from the table.
        same: ``"yes"``, ``"no"``, ``"in part"``, ``"not decided"`` (our error bars allow both), or
            ``"-"`` where nothing was published.
        why: why it is the same or not, as far as the data say.
        power: what it would take to decide it, where it is not decided.
    """

    what: str
    published: str
    ours: str
    same: Verdict | Literal["-"]
    why: str
    power: str = ""


@dataclass(frozen=True)
class Experiment:
    """One figure or table.

    Args:
        name: of its module.
        title: what it shows.
        source: paper and figure.
        models: ``"addition"`` (only models that add integers), ``"any"``, or ``"none"`` (it makes
            its own).
        minutes: budget in core-minutes by size, with the default models.
        parts: the units of work for these models at this size.
        figure: a figure of the table.
        text: what was found, from the table.
        claims: published statements beside ours, from the table.
        version: raised when the parts' code changes what they give.
    """

    name: str
    title: str
    source: str
    models: Literal["addition", "any", "none"]
    minutes: Mapping[Size, float]
    parts: Callable[[tuple[Subject, ...], Size], Iterable[Part]]
    figure: Callable[[pd.DataFrame], Figure]
    text: Callable[[pd.DataFrame], str]
    claims: Callable[[pd.DataFrame], list[Claim]] = lambda table: []
    version: int = 1


@runtime_checkable
class Measures(Protocol):
    """The module of an experiment that measures."""

    def parts(self, subjects: tuple[Subject, ...], size: Size) -> list[Part]:
        """The units of work."""


@runtime_checkable
class Draws(Protocol):
    """The module that draws."""

    def figure(self, table: pd.DataFrame) -> Figure:
        """A figure of the table."""


@runtime_checkable
class Says(Protocol):
    """The module that puts in words."""

    def text(self, table: pd.DataFrame) -> str:
        """What was found."""

    def claims(self, table: pd.DataFrame) -> list[Claim]:
        """Published statements beside ours."""


def experiment(
    name: str,
    title: str,
    source: str,
    *,
    models: Literal["addition", "any", "none"],
    minutes: tuple[float, float, float],
    modules: tuple[Measures, Draws, Says],
    version: int = 1,
) -> Experiment:
    """An experiment made of its folder's modules; ``minutes`` by size."""
    measure, draws, says = modules
    return Experiment(
        name, title, source, models, by_size(*minutes), measure.parts, draws.figure, says.text,
        says.claims, version,
    )  # fmt: skip


def listed(found: Callable[P, Iterator[T]]) -> Callable[P, list[T]]:
    """A generator's items in a list."""

    @wraps(found)
    def whole(*args: P.args, **kwargs: P.kwargs) -> list[T]:
        return list(found(*args, **kwargs))

    return whole


def joined(found: Callable[P, Iterator[str]]) -> Callable[P, str]:
    """A generator's lines as one text."""

    @wraps(found)
    def whole(*args: P.args, **kwargs: P.kwargs) -> str:
        return "\n".join(found(*args, **kwargs))

    return whole
