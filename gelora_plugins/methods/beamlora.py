"""BeamLoRA (Gu et al., 2025, arXiv 2502.13604), after its published code: weak ranks become copies of strong ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import Pair, expect, generator
from gelora_plugins.methods.row_gates import RowGates, by_module

logger = logging.getLogger(__name__)

SCOPES, EXPANSIONS, MOMENTS = ("all", "module"), ("average", "preserve"), ("exp_avg", "exp_avg_sq")


@dataclass(eq=False)
class BeamLoRA(RowGates):
    """Weigh the r ranks of each module with p = r · softmax(g/τ); every so often replace the weakest by copies.

    g begins at 0, where p is 1, so that the function of any adapter is unchanged. Each `period` steps, but not in the
    last of them, the ranks are sorted by p, and those are pruned from which on the sum of p exceeds 1 - η of the whole;
    no more than half of a module's. A pruned rank gets the row of A, the column of B and the optimizer's moments that
    one of the module's strongest had half a period before, and both get the mean of their g. η falls from `eta` to 0
    as half a cosine over the first `until` of the training.

    The full text was not available; this is after the published code, which pairs with torch's global generator (other
    pairs in each process), takes one rank for all modules in the sum, may copy pruned ranks onto each other where
    more than half are pruned, may prune at η = 0 by rounding, decays the gates' weights and cannot resume. That the
    mean of two g is the geometric one of their weights, so that the function jumps, is as published.

    Attributes:
        tau: τ.
        period: steps, even; None: a twelfth of the training.
        eta, until: see above.
        scope: sum and sort over "all" modules, as published, or in each "module".
        expand: "average" as published. "preserve" is of this package: both copies get half of the strong one's weight,
            and the weight of the pruned one goes to all.

    Raises:
        ConfigError: a value is out of range.
        MethodError: the training is shorter than two periods.
    """

    name: ClassVar[str] = "beamlora"

    tau: float = 0.05
    period: int | None = None
    eta: float = 0.05
    until: float = 2 / 3
    scope: str = "all"
    expand: str = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.tau > 0, "tau", self.tau, "a number above 0")
        if self.period is not None:
            even = isinstance(self.period, int) and self.period > 0 and self.period % 2 == 0
            expect(even, "period", self.period, "an even number of steps, at least 2")
        expect(0 <= self.eta < 1, "eta", self.eta, "a share of at least 0 and below 1")
        expect(0 < self.until <= 1, "until", self.until, "a share above 0 and up to 1")
        for option, known in (("scope", SCOPES), ("expand", EXPANSIONS)):
            expect(getattr(self, option) in known, option, getattr(self, option), f"one of: {', '.join(known)}")

    def check(self) -> None:
        """There is time for an exchange."""
        super().check()
        steps = self.state.max_steps
        self._period = self.period or max(2, 2 * round(steps / 24))
        if self.eta and steps < 2 * self._period:
            raise MethodError(
                f"beamlora exchanges ranks every {self._period} steps but not in the last of them, and the training "
                f"has {steps}. Train for more steps, or set a lower period."
            )

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """See `RowGates.begin`."""
        width = max(len(pair.a) for pair in self.pairs)
        places = [i * width + j for i, pair in enumerate(self.pairs) for j in range(len(pair.a))]
        self._width, self._places = width, torch.tensor(places, device=self.pairs[0].a.device)
        self._copies: dict[str, Tensor] = {}
        if saved is not None:
            devices = {pair.name: pair.a.device for pair in self.pairs}
            copies = {key.removeprefix("copy."): value for key, value in saved.items() if key.startswith("copy.")}
            self._copies = {key: value.to(devices[key.partition(".")[2]]) for key, value in copies.items()}
        super().begin(saved)

    def saved(self) -> dict[str, Tensor]:
        """The copies that pruned ranks are to get, beside what `RowGates` keeps."""
        return super().saved() | {f"copy.{key}": value for key, value in self._copies.items()}

    def close(self) -> None:
        """See `RowGates.close`."""
        super().close()
        self._copies = {}

    def draw(self) -> Tensor:
        """All 0."""
        return torch.zeros(sum(self.sizes))

    def factors(self) -> Tensor:
        """p: r · softmax(g/τ) in each module, which is 1 where all are equal, without rounding."""
        table = self.gates.new_full((len(self.pairs) * self._width,), -math.inf)
        table[self._places] = self.gates.detach() / self.tau
        table = table.view(-1, self._width)
        weights = (table - table.amax(1, keepdim=True)).exp()
        ranks = self.gates.new_tensor(self.sizes)[:, None]
        return (weights * ranks / weights.sum(1, keepdim=True)).view(-1)[self._places]

    def pull_back(self, gradient: Tensor) -> Tensor:
        """∂g_k = (p_k u_k - p_k Σ_i p_i u_i / r) / τ, in each module."""
        p = self.factors()
        table = p.new_zeros(len(self.pairs) * self._width)
        table[self._places] = p * gradient
        means = table.view(-1, self._width).sum(1) / p.new_tensor(self.sizes)
        rows = self._places // self._width
        return (p * gradient - p * means[rows]) / self.tau

    def after_step(self, step: int) -> None:
        """Keep copies, half a period before they are needed."""
        if not self.eta or step == 0 or step % self._period == 0 or step % (self._period // 2):
            return
        first, self._copies = not self._copies, {}
        for pair, raw in zip(self.pairs, self.raw, strict=True):
            self._copies[f"a.{pair.name}"] = raw.clone()
            self._copies[f"b.{pair.name}"] = pair.b.detach().clone()
            self._copies |= {key: moment.clone() for key, _, moment in self._moments(pair)}
        if first and len(self._copies) < 6 * len(self.pairs):
            logger.warning(
                "beamlora copies matrices without what the optimizer has for them, which is not of their shape: only "
                "AdamW in full precision has it so."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Exchange ranks, at the end of a period."""
        step = state.global_step
        if not self._running or step % self._period or state.max_steps - step < self._period:
            return
        share = self.pruned_share(step - 1, state.max_steps)
        if share > 0 and self._copies:
            with torch.no_grad():
                self._exchange(step, share)
                self.exp_avg.zero_()
                self.exp_avg_sq.zero_()
                self.fold()

    def finish(self) -> None:
        """The adapter is plain as it stands, with the ranks that it had."""

    def pruned_share(self, step: int, steps: int) -> float:
        """η: `eta` at step 0, and 0 from `until` of the training on."""
        end = self.until * steps
        return 0.0 if step >= end else self.eta * (1 + math.cos(math.pi * step / end)) / 2

    def _exchange(self, step: int, share: float) -> None:
        p = self.factors()
        pruned = weakest(p, self.sizes, 1 - share, self.scope)
        parts = by_module(self.gates, self.sizes)
        for pair, raw, gates, mine, weak in zip(
            self.pairs, self.raw, parts, by_module(p, self.sizes), pruned, strict=True
        ):
            if not len(weak):
                continue
            strong = mine.argsort(descending=True, stable=True)[: len(weak)].cpu()
            source = generator(self.args.seed, step, pair.name)
            strong = strong[torch.randperm(len(weak), generator=source)]
            self._copy(pair, raw, weak, strong)
            weak, strong = weak.to(gates.device), strong.to(gates.device)
            if self.expand == "average":
                both = (gates[weak] + gates[strong]) / 2
            else:
                both = gates[strong] - self.tau * math.log(2)
            gates[weak] = gates[strong] = both

    def _copy(self, pair: Pair, raw: Tensor, weak: Tensor, strong: Tensor) -> None:
        """Give ranks `weak` what ranks `strong` had when the copies were made."""
        targets = [(f"a.{pair.name}", 0, raw), (f"b.{pair.name}", 1, pair.b), *self._moments(pair)]
        for key, axis, target in targets:
            if key in self._copies:
                to, of = weak.to(target.device), strong.to(target.device)
                target.index_copy_(axis, to, self._copies[key].index_select(axis, of))

    def _moments(self, pair: Pair) -> list[tuple[str, int, Tensor]]:
        """(key, axis of the ranks, tensor) of what AdamW has for both matrices; 8-bit optimizers have no such."""
        found = []
        for kind, axis, matrix in (("a", 0, pair.a), ("b", 1, pair.b)):
            for key in MOMENTS:
                moment = self.optimizer.state.get(matrix, {}).get(key)
                if isinstance(moment, Tensor) and moment.shape == matrix.shape:
                    found.append((f"{key}_{kind}.{pair.name}", axis, moment))
        return found


def weakest(p: Tensor, sizes: list[int], keep: float, scope: str) -> list[Tensor]:
    """The ranks of each module that are pruned: in descending order of p, from where its sum exceeds `keep` of all.

    Args:
        p: (sum of `sizes`,), module by module.
        keep: share of the sum of p.
        scope: whether sums are over "all" modules or in each "module".
    """
    pruned = torch.zeros(len(p), dtype=torch.bool)
    p = p.detach().double().cpu()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ranges = [(0, len(p))] if scope == "all" else [(s, s + size) for s, size in zip(starts, sizes, strict=True)]
    for start, end in ranges:
        order = p[start:end].argsort(descending=True, stable=True)
        over = p[start:end][order].cumsum(0) > keep * (end - start)
        pruned[start + order[over]] = True
    found = []
    for mine, gone in zip(by_module(p, sizes), by_module(pruned, sizes), strict=True):
        order = mine.argsort(descending=True, stable=True).flip(0)  # no rank is among the strongest, too, in a tie
        found.append(order[: min(int(gone.sum()), len(mine) // 2)])
    return found
