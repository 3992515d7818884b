"""Does it matter how the ranks are chosen? One budget, many ways to fill it, and the roundings of the published rule.

    python -m benchmarks.compare.sensitivity sst2 --data DIR [--jobs 2]

Each way is compared with the uniform rank at its own cost: the pooling, the estimator, the "+1" of the rule, the alpha
rule (one scaling, or one lora_alpha), the rounding. Ways that come to the same ranks are trained once.
"""

import math
from dataclasses import replace
from typing import Any

from benchmarks.compare.tasks import arguments, chosen, task_and_settings
from benchmarks.machine import RESULTS
from gelora_plugins import GeLoRAConfig, RankPlan
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.run import compare, measured, planned

WAYS: dict[str, dict[str, Any]] = {
    "mean, twonn_mle": {"policy": "budget"},
    "last token": {"policy": "budget", "pooling": "last"},
    "linear fit": {"policy": "budget", "estimator": "twonn"},
    **{f"published, {rounding}": {"rounding": rounding} for rounding in ("nearest", "ceil", "floor", "dimensions")},
}
ONE_ALPHA = "one lora_alpha"


def plans_of(bench: Bench) -> dict[str, RankPlan]:
    """Every way to choose, as a plan."""
    plans = {}
    for name, options in WAYS.items():
        config = GeLoRAConfig(**options)
        plans[name] = planned(bench, measured(bench, config), config, config.policy)
    base = plans["mean, twonn_mle"]
    plans["without + 1"] = replace(base, ranks=without_one(base), rank_changes=())
    plans[ONE_ALPHA] = base
    return plans


def without_one(plan: RankPlan) -> tuple[int, ...]:
    """Rank 1 everywhere, and the rest of the budget in proportion to the growth alone; largest remainders first."""
    growth = [max(value or 0.0, 0.0) for value in plan.profile.growth()]
    left = sum(plan.ranks) - len(plan.ranks)
    if not any(growth):
        return plan.ranks
    shares = [left * value / sum(growth) for value in growth]
    ranks = [1 + math.floor(share) for share in shares]
    order = sorted(range(len(ranks)), key=lambda i: math.floor(shares[i]) - shares[i])
    for i in order[: sum(plan.ranks) - sum(ranks)]:
        ranks[i] += 1
    return tuple(ranks)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    output = options.output or RESULTS / "compare-sensitivity"
    for name in options.tasks:
        model, task, settings = task_and_settings(name, options.data)
        settings = replace(chosen(options, settings), allocations=("plan", "uniform"), methods=("lora",))
        plans = plans_of(Bench(model, task, settings, output / task.name))
        found = compare(model, task, output, settings, plans=plans, keep_alpha=[ONE_ALPHA], jobs=options.jobs)
        found.write(output)
        print(found.table(name))
    print("\n".join(found.lines()))


if __name__ == "__main__":
    main()
