"""The reading "completion tokens only": the point of a document is the mean over the tokens that are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gelora_plugins import DimensionProfile, GeLoRAConfig, hookimpl, json_files
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.task import IGNORED_LABEL
from gelora_plugins.pipeline import measure
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.probe.pooling import mean


class CompletionTokens:
    """A plugin that is the collator too: a pooling sees which tokens are real, and only the batch has the labels."""

    def __init__(self, bench: Bench) -> None:
        self.collator = bench.collator
        self.trained: Tensor | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.collator([row["row"] for row in rows])
        self.trained = batch.pop("labels") != IGNORED_LABEL
        return batch

    @hookimpl
    def register_poolings(self) -> dict[str, object]:
        return {"completion": self.over_completion}

    def over_completion(self, hidden: Tensor, mask: Tensor) -> Tensor:
        assert self.trained is not None
        return mean(hidden, self.trained & mask)


def measure_completions(bench: Bench) -> DimensionProfile:
    """The profile over the completions of the training rows of `bench`: measured once, then read."""
    path = bench.cache / "profile-completion.json"
    if path.is_file():
        return DimensionProfile.from_dict(json_files.read_json(path))
    reading = CompletionTokens(bench)
    plugin_manager().register(reading, name="completion-tokens")
    # In a field of their own the rows have no `input_ids`, so the probe leaves the batches to the collator.
    rows = [{"row": row} for row in bench.train if any(label != IGNORED_LABEL for label in row["labels"])]
    profile = measure(bench.load(0), rows, GeLoRAConfig(pooling="completion"), layout=bench.layout, collator=reading)
    json_files.write_json(path, profile.to_dict())
    return profile
