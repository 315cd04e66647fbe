"""The arithmetic of a layout: degrees, coordinates and who shares an axis. Integers only.

A run's ranks form one grid, `pp` slowest and `tp` fastest, so that the ranks that talk most (tensor parallel)
sit next to each other on a node. What is left over after pp, cp and tp is data parallel:

    rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank

No process group and no torch in here: the planner and the tests ask the same object as the runtime does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

AXES = ("pp", "dp", "cp", "tp")
DATA = "dp_cp"
"""The axes dp and cp as one: ranks that hold the same weights and see other tokens. ZeRO shards over it."""


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of each parallel axis; `dp` is the rest.

    Raises ValueError when tp x pp x cp does not divide the world size, or a degree is below 1.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("world_size", "tp", "pp", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.world_size % (self.tp * self.pp * self.cp):
            raise ValueError(
                f"tp {self.tp} x pp {self.pp} x cp {self.cp} = {self.tp * self.pp * self.cp} "
                f"does not divide the world size {self.world_size}"
            )

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp * self.cp)

    @property
    def degrees(self) -> dict[str, int]:
        """Axis name -> degree, slowest axis first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name -> this rank's index along it."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size}")
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, self.degrees[axis])
        return found

    def rank(self, coordinates: dict[str, int]) -> int:
        """The inverse of `coordinates`."""
        rank = 0
        for axis in AXES:
            rank = rank * self.degrees[axis] + coordinates[axis]
        return rank

    def ranks_along(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that share every coordinate with `rank` except `axis`, in order of that axis.

        `axis` may be several, joined by an underscore in the order of `AXES`: "dp_cp".
        """
        moving = axis.split("_")
        here = self.coordinates(rank)
        places = product(*(range(self.degrees[name]) for name in moving))
        return tuple(self.rank({**here, **dict(zip(moving, place, strict=True))}) for place in places)

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Every group of ranks along `axis`; together they hold each rank once."""
        return sorted({self.ranks_along(axis, rank) for rank in range(self.world_size)})
