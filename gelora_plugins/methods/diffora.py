"""DiffoRA-style selection of modules: no reproduction, as the text of DiffoRA (Jiang et al., 2025) was not available.

Its abstract has a differential matrix over the modules that says which of them are adapted, relaxed and then made
discrete. All else here, the search, the rule and the schedule, is a design of this package.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import Pair, expect, forget, generator
from gelora_plugins.methods.gate_budget import strongest
from gelora_plugins.methods.row_gates import RowGates, cost_of
from gelora_plugins.plugins import find_layout
from gelora_plugins.ranks.adapter import drop_modules

logger = logging.getLogger(__name__)

SCOPES, SCORES, CHOICES = ("block", "all"), ("gate", "update"), ("best", "random", "worst")
SHORTEST = 50  # steps of a search, where nothing is said


@dataclass(eq=False)
class DiffoRA(RowGates):
    """Find out in the first steps which modules to adapt; then begin anew with those alone.

    In the search each module has one gate sigmoid(θ) on its update, with θ = 0 at first. Even steps train A and B, odd
    ones θ alone, on rows that A and B have not had in this pass over the data; a tenth of the search goes by before,
    as θ has no gradient while B is 0. After it the modules are chosen, A is as before the search, B is 0, and the
    optimizer has forgotten both. The learning rate goes on as it was. At the end the adapter is taken off the others.

    The search is part of the training, so that a comparison is at equal steps. It cannot tell an open gate from a
    large B A, which make up for each other; see `score`.

    Attributes:
        search: steps of the search; None: a tenth of the training, and no less than 50. 0 chooses without one.
        share: of the modules that stay, in each block rounded up; with scope "all" of their LoRA parameters.
        budget: LoRA parameters that stay, in place of `share`; for scope "all".
        scope: whether modules are compared within their "block" or with "all".
        score: "gate" is sigmoid(θ), "update" that times ||B A||_F.
        choose: the "best" modules; as controls as many at "random", or the "worst".
        chosen: (modules,) bool, those that stay; None in the search.

    Raises:
        ConfigError: a value is out of range.
        MethodError: the training is no longer than the search, or no module fits into the budget.
    """

    name: ClassVar[str] = "diffora"
    chooses_ranks: ClassVar[bool] = True
    fresh_only: ClassVar[bool] = True

    gate_lr: float = 10.0
    search: int | None = None
    share: float = 0.5
    budget: int | None = None
    scope: str = "block"
    score: str = "gate"
    choose: str = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search is not None:
            expect(isinstance(self.search, int) and self.search >= 0, "search", self.search, "a whole number of steps")
        expect(0 < self.share <= 1, "share", self.share, "a share above 0 and up to 1")
        for option, known in (("scope", SCOPES), ("score", SCORES), ("choose", CHOICES)):
            expect(getattr(self, option) in known, option, getattr(self, option), f"one of: {', '.join(known)}")
        if self.budget is not None:
            whole = isinstance(self.budget, int) and self.budget > 0
            expect(whole and self.scope == "all", "budget", self.budget, "a whole number above 0, with scope='all'")

    def planned(self, ranks: Sequence[int], costs: Sequence[int]) -> tuple[Self, tuple[int, ...]]:
        """Fewer modules of higher ranks, rounded up: those that fit into the parameters of `ranks`."""
        budget = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        return replace(self, budget=budget, scope="all"), tuple(math.ceil(rank / self.share) for rank in ranks)

    def check(self) -> None:
        """There are steps after the search, and a module fits."""
        super().check()
        steps = self.state.max_steps
        self._search = max(SHORTEST, steps // 10) if self.search is None else self.search
        if self._search >= steps:
            raise MethodError(
                f"diffora searches for {self._search} steps, and the training has {steps}. Train for more, or set a "
                "shorter search."
            )
        cheapest = min(self._weights())
        if self.budget is not None and self.budget < cheapest:
            raise MethodError(
                f"diffora is to leave {self.budget} LoRA parameters, and the smallest module has {cheapest}. Set a "
                "higher budget, or lower ranks to begin with."
            )
        self._blocks = self._find_blocks() if self.scope == "block" else []

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """See `RowGates.begin`."""
        chosen = None if saved is None else saved.get("chosen")
        self.chosen = None if chosen is None else chosen.tolist()
        self._first = {} if self.chosen else {pair.name: pair.a.detach().clone() for pair in self.pairs}
        if saved is not None:
            for name, first in self._first.items():
                first.copy_(saved[f"first.{name}"])
        super().begin(saved)
        if self.chosen is None and self._search == 0:
            self._settle()
            self.fold()

    def saved(self) -> dict[str, Tensor]:
        """What the search begins and ends with, beside what `RowGates` keeps."""
        first = {f"first.{name}": first for name, first in self._first.items()}
        return super().saved() | first | ({} if self.chosen is None else {"chosen": torch.tensor(self.chosen)})

    def close(self) -> None:
        """See `RowGates.close`."""
        super().close()
        self._first = {}

    def draw(self) -> Tensor:
        """θ = 0 for each module."""
        return torch.zeros(len(self.pairs))

    def spread(self, values: Sequence[float]) -> Tensor:
        """There is one gate for each pair."""
        return torch.tensor(values).to(self.gates.device)

    def factors(self) -> Tensor:
        """sigmoid(θ), for each rank; 1 after the search."""
        gates = torch.ones_like(self.gates) if self.chosen else self.gates.detach().sigmoid()
        return gates.repeat_interleave(torch.tensor(self.sizes, device=gates.device))

    def pull_back(self, gradient: Tensor) -> Tensor:
        """∂θ = sigmoid'(θ) Σ_i u_i, in each module."""
        gates = self.gates.detach().sigmoid()
        sums = torch.stack([part.sum().to(gates.device) for part in self.parts(gradient)])
        return gates * (1 - gates) * sums

    def regularise(self) -> None:
        """Leave gradients to what is trained in this step."""
        odd = self.state.global_step % 2 == 1 and self.state.global_step >= self._search // 10
        gated = self.chosen is None and odd
        if not gated:
            self.gates.grad = None
        for i, pair in enumerate(self.pairs):
            if gated or not (self.chosen is None or self.chosen[i]):
                pair.a.grad = pair.b.grad = None

    def after_step(self, step: int) -> None:
        """Choose, after the last step of the search."""
        if step == self._search - 1:
            self._settle()

    def finish(self) -> None:
        """Take the adapter off the modules that were not chosen; by their matrices, as the best may be loaded."""
        chosen = self.chosen or [True] * len(self.pairs)
        others = [pair for pair, stays in zip(self.pairs, chosen, strict=True) if not stays]
        gone = {pair.name for pair in others if not bool(pair.b.detach().any())}
        drop_modules(self.adapter, gone)
        if self.chosen is None or len(gone) < len(others):
            logger.warning(
                "diffora leaves all modules: the training ended, or the best checkpoint, which was loaded, is from "
                "before the end of the search."
            )

    def _settle(self) -> None:
        scores = self._scores()
        self.chosen = self._choice(scores)
        with torch.no_grad():
            for pair, raw in zip(self.pairs, self.raw, strict=True):
                raw.copy_(self._first[pair.name])
                pair.b.zero_()
                forget(self.optimizer, [pair.a, pair.b])
        self._first = {}
        names = [pair.name for pair, stays in zip(self.pairs, self.chosen, strict=True) if stays]
        logger.info("diffora adapts %d of %d modules: %s.", len(names), len(self.pairs), ", ".join(names))

    def _scores(self) -> list[float]:
        gates: list[float] = self.gates.detach().sigmoid().tolist()
        if self.score == "gate":
            return gates
        return [gate * size_of(pair.b, raw) for gate, pair, raw in zip(gates, self.pairs, self.raw, strict=True)]

    def _choice(self, scores: list[float]) -> list[bool]:
        if self.choose == "random":
            scores = torch.rand(len(scores), generator=generator(self.args.seed, 0, self.name)).tolist()
        elif self.choose == "worst":
            scores = [-score for score in scores]
        if self.scope == "block":
            return best_of_each(scores, self._blocks, self.share)
        weights = self._weights()
        budget = math.floor(self.share * sum(weights) + 1e-9) if self.budget is None else self.budget
        return strongest(scores, [1] * len(scores), weights, max(budget, min(weights)))

    def _weights(self) -> list[int]:
        """LoRA parameters of each module."""
        return [len(pair.a) * cost_of(pair) for pair in self.pairs]

    def _find_blocks(self) -> list[str]:
        """The block of each module; one outside the blocks is compared with none."""
        names = [block.name for block in find_layout(self.adapter.model).blocks]
        return [_block_of(pair, names) for pair in self.pairs]


def best_of_each(scores: Sequence[float], groups: Sequence[str], share: float) -> list[bool]:
    """Which entries are among the best `share` of their group, rounded up; of equal ones the first."""
    chosen = [False] * len(scores)
    for group in dict.fromkeys(groups):
        members = sorted((i for i, other in enumerate(groups) if other == group), key=lambda i: -scores[i])
        for i in members[: math.ceil(share * len(members) - 1e-9)]:
            chosen[i] = True
    return chosen


def size_of(b: Tensor, a: Tensor) -> float:
    """||B A||_F, without the product."""
    b, a = b.detach().float(), a.detach().float()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def _block_of(pair: Pair, blocks: Sequence[str]) -> str:
    return next((name for name in blocks if pair.name.startswith(f"{name}.")), pair.name)
