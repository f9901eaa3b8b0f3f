"""What a suite of experiments is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Text(NamedTuple):
    """A text of the report in both of its languages."""

    en: str
    zh: str


@dataclass(frozen=True)
class Cell:
    """One way to train, once for each seed.

    Args:
        name: of its metrics files; letters, digits and underscores.
        data: a set of `SETS` in scenes.py, or "coco".
        recipe: below configs/, without .yaml.
        settings: `key=value` changes of it.
        proposals_of: a cell whose RPN this one's heads are trained on; None: its own.
    """

    name: str
    data: str
    recipe: str
    settings: tuple[str, ...] = ()
    proposals_of: str | None = None


@dataclass(frozen=True)
class Claim:
    """What the paper says of two cells.

    Args:
        metric: such as segm/AP, in 0..100.
        paper: better minus worse there; None: it gives no figure.
        expects: "more": `one` is better than `other`; "same": they differ by less than `margin`.
    """

    one: str
    other: str
    metric: str
    paper: float | None
    expects: Literal["more", "same"] = "more"
    margin: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """A question of the paper, the cells that answer it, and what the paper found.

    Args:
        source: the table or section of arXiv 1703.06870v3.
        cells: of a suite, with a label for tables and plots.
        metrics: of the report's table.
        paper: cell: metric: value, of the corresponding network there.
    """

    name: str
    source: str
    title: Text
    question: Text
    cells: Mapping[str, str]
    metrics: tuple[str, ...]
    claims: tuple[Claim, ...]
    paper: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Suite:
    name: str
    cells: Mapping[str, Cell]
    comparisons: tuple[Comparison, ...]
    seeds: int
    """Runs of a cell, unless the command says otherwise."""
    races: bool = False
    """Whether the race with torchvision (race.py) is part of it."""

    def chosen(self, names: tuple[str, ...]) -> tuple[Comparison, ...]:
        """The comparisons of these names; all of them if there are none.

        Raises:
            ValueError: the suite has no comparison of a name.
        """
        known = {one.name: one for one in self.comparisons}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no comparison {', '.join(unknown)}; there are {', '.join(known)}")
        return tuple(one for one in self.comparisons if not names or one.name in names)

    def needed(self, comparisons: tuple[Comparison, ...]) -> list[Cell]:
        """Each cell once, one whose proposals another takes before it."""
        found: dict[str, Cell] = {}
        for comparison in comparisons:
            for name in comparison.cells:
                cell = self.cells[name]
                if cell.proposals_of is not None:
                    found.setdefault(cell.proposals_of, self.cells[cell.proposals_of])
                found.setdefault(cell.name, cell)
        return list(found.values())
