"""The processes that train one model together. torchrun, or what stands in for it, starts them."""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of its machine

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0


ALONE = Group()
