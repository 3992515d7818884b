"""Other readings of the profile, each against its own permutations; PREREGISTRATION.md says what is judged, and how.

    python -m benchmarks.compare.readings docstrings sst2 --data DIR [--only READING,...] [--jobs 2]

Every reading becomes ranks in the same way: in proportion to it, none below 1, at the cost of the user's own rank.
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.compare.tasks import arguments, chosen, task_and_settings
from benchmarks.machine import RESULTS
from gelora_plugins import GeLoRAConfig, RankPlan
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.run import compare, measured, planned
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.hookspecs import hookimpl
from gelora_plugins.layout import Block, ModelLayout
from gelora_plugins.pipeline import measure
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.ranks.policies import needs, within_budget


class MiddleToken:
    """A plugin: the point of a document is its middle token, so that points are states of tokens, not their means."""

    @hookimpl
    def register_poolings(self) -> dict[str, object]:
        return {"middle": self.middle}

    @staticmethod
    def middle(hidden: Tensor, mask: Tensor) -> Tensor:
        first, count = mask.int().argmax(dim=1), mask.sum(dim=1)
        return hidden[torch.arange(len(hidden)), first + count // 2].float()


def readings(bench: Bench) -> dict[str, list[float]]:
    """The need of every block, by reading."""
    profile = measured(bench, GeLoRAConfig())
    before_and_after = [
        (profile.estimates[before].value or 0.0, profile.estimates[after].value or 0.0)
        for before, after in profile.layout.block_boundaries()
    ]
    relative = [max(after / before - 1, 0.0) if before else 0.0 for before, after in before_and_after]
    return {
        "dimension": [after for _, after in before_and_after],
        "relative growth": relative if any(relative) else [1.0] * len(relative),
        "either way": [1 + abs(after - before) if before else 1.0 for before, after in before_and_after],
        "attention": [max(growth or 0.0, 0.0) + 1 for growth in over_attention(bench).growth()[::2]],
        "middle token": needs(measured(bench, GeLoRAConfig(pooling="middle")), bench.sites),
        "ramp": [float(place) for place, _ in enumerate(bench.sites, 1)],
    }


def over_attention(bench: Bench) -> DimensionProfile:
    """The profile with a boundary after each attention of BERT, so that even "blocks" are attentions alone."""
    halves = tuple(
        Block(f"{block.name}.{part}", ()) for block in bench.layout.blocks for part in ("attention", "output")
    )
    layout = ModelLayout(bench.layout.model_type, bench.layout.backbone, (halves,))
    rows = [{name: row[name] for name in row if name != "labels"} for row in bench.train]
    return measure(bench.load(0), rows, GeLoRAConfig(), layout=layout)


def plans_of(bench: Bench, only: str | None) -> dict[str, RankPlan]:
    """A plan for every reading, or for those that are named."""
    base = planned(bench, measured(bench, GeLoRAConfig()), GeLoRAConfig(), "uniform")
    found = readings(bench)
    names = only.split(",") if only else list(found)
    return {
        name: replace(base, ranks=tuple(within_budget(found[name], bench.sites, base.base_rank)), rank_changes=())
        for name in names
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", help="which readings, with commas")
    options = parser.parse_args()
    plugin_manager().register(MiddleToken(), name="middle-token")
    output = options.output or RESULTS / "compare-readings"
    for name in options.tasks:
        model, task, settings = task_and_settings(name, options.data)
        settings = replace(chosen(options, settings), allocations=("plan", "uniform", "permuted"), methods=("lora",))
        plans = plans_of(Bench(model, task, settings, output / task.name), options.only)
        print({reading: plan.ranks for reading, plan in plans.items()})
        found = compare(model, task, output, settings, plans=plans, jobs=options.jobs)
        found.write(output)
        print(found.table(name))
    print("\n".join(found.lines()))


if __name__ == "__main__":
    main()
