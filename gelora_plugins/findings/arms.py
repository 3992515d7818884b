"""What a comparison compares: groups of arms at equal LoRA parameters, and the recipe of one training run.

Integers and names; no model, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gelora_plugins.errors import PlanError

TOLERANCE = 0.01  # LoRA parameters of the arms of a group may differ by this share, and no more
GRID = "uniform r = "  # how the name of a group of the grid of uniform ranks begins
HEADROOM = "headroom of "  # how the name of a group of random allocations begins; that of the group it is of follows


@dataclass(frozen=True)
class Recipe:
    """What one training run adapts, and how; with a seed and a learning rate it is a run.

    Attributes:
        kind: "lora", "eva", "full", or a training method with its options, as in "flat_lora sigma=0.1".
        ranks: one per site; of a method that chooses ranks itself those that cost as much as what it ends with. Empty
            for "eva" and "full", and for "adalora" in older records.
        budget: sum of the ranks over all target modules for "eva", and "adalora" in older records, else 0.
        keep_alpha: whether lora_alpha is the same everywhere, so that the scaling falls with the rank; else the
            scaling is the same everywhere.
        parameters: LoRA parameters at the end, heads not counted; for "full" all parameters.
        scalings: one per site, by how much its scaling is larger than that of the settings; empty: nowhere.
    """

    kind: str
    parameters: int
    ranks: tuple[int, ...] = ()
    budget: int = 0
    keep_alpha: bool = False
    scalings: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values. Runs are told by them, so those of a recipe of before have none that came later."""
        return {name: value for name, value in asdict(self).items() if name != "scalings" or value}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`."""
        return cls(**{**data, "ranks": tuple(data["ranks"]), "scalings": tuple(data.get("scalings", ()))})


@dataclass(frozen=True)
class Arm:
    """A name, and what it trains: seed number s trains `recipes[s % len(recipes)]`; more than one for "permuted"."""

    name: str
    recipes: tuple[Recipe, ...]

    def recipe(self, seed: int) -> Recipe:
        """What this arm trains with `seed`."""
        return self.recipes[seed % len(self.recipes)]


@dataclass(frozen=True)
class Group:
    """Arms at equal LoRA parameters. In records it is a row, and its arms are methods.

    Raises:
        PlanError: two arms differ by 1 % or more.
    """

    name: str
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise PlanError(f"Two arms of {self.name!r} have one name: {', '.join(names)}. Name the plan otherwise.")
        costs = {arm.name: recipe.parameters for arm in self.arms for recipe in arm.recipes}
        least, most = min(costs, key=lambda name: costs[name]), max(costs, key=lambda name: costs[name])
        if costs[most] - costs[least] >= TOLERANCE * costs[least]:
            raise PlanError(
                f"The arms of {self.name!r} are not at equal parameters: {least} has {costs[least]:,} and {most} "
                f"{costs[most]:,}; expected less than {TOLERANCE:.0%} between them. Adapt target modules of one size, "
                "or leave out the method."
            )

    @property
    def parameters(self) -> int:
        """LoRA parameters of the first arm."""
        return self.arms[0].recipes[0].parameters
