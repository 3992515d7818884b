"""What a Trainer's probe reads is what the Trainer trains on, and what it trains on is what it would have without."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.errors import ProbeError
from tests.support.tiny import VOCABULARY
from tests.support.training import peft_model, rows, saved_plan, trainer_for

FEW = GeLoRAConfig(probe_samples=60)


class Reads:
    """A collator that keeps the first token of what it is given, and puts `more` behind the tokens of a row."""

    def __init__(self) -> None:
        self.firsts: list[int] = []

    def __call__(self, some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.firsts += [row["input_ids"][0] for row in some]
        ids = [torch.tensor([*row["input_ids"], *row.get("more", ())]) for row in some]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": batch, "attention_mask": (batch != 0).int(), "labels": batch}


@pytest.mark.parametrize("keeps", [True, False])
def test_columns_reach_the_probe_as_they_reach_the_training(keeps: bool, tmp_path: Path) -> None:
    data = [{**row, "more": [5, 6, 7]} for row in rows()]
    options = {"train_dataset": data, "data_collator": Reads(), "remove_unused_columns": not keeps}
    trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(probe_samples=len(data))), **options).train()
    alone = sum(len(row["input_ids"]) for row in data)
    assert saved_plan(tmp_path).profile.num_tokens == alone + 3 * keeps * len(data)


class Once(IterableDataset):
    def __init__(self, count: int) -> None:
        self.rows = iter(rows(count))

    def __iter__(self) -> Any:
        return self.rows


def test_a_stream_that_can_be_read_once_loses_no_row(tmp_path: Path) -> None:
    firsts = [row["input_ids"][0] for row in rows(90)]
    with pytest.raises(ProbeError, match="can be read once"):
        trainer_for(peft_model(), tmp_path, GeLoRACallback(FEW), train_dataset=Once(90)).train()
    collator = Reads()
    callback = GeLoRACallback(GeLoRAConfig(probe_samples=60, on_failure="keep"))
    trainer_for(peft_model(), tmp_path, callback, train_dataset=Once(90), data_collator=collator).train()
    assert collator.firsts[:3] == firsts[:3]


class Random(Dataset):
    """Draws the rows' last token from a generator of its own when it is read."""

    def __init__(self, generator: Any) -> None:
        self.rows, self.generator = rows(), generator

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        drawn = {
            random.Random: lambda g: g.randrange(3, VOCABULARY),
            np.random.RandomState: lambda g: g.randint(3, VOCABULARY),
            np.random.Generator: lambda g: g.integers(3, VOCABULARY),
            torch.Generator: lambda g: torch.randint(3, VOCABULARY, (1,), generator=g).item(),
        }[type(self.generator)](self.generator)
        ids = [int(drawn), *self.rows[i]["input_ids"]]
        return {"input_ids": ids, "labels": ids}


GENERATORS = {
    "random": lambda: random.Random(0),
    "numpy, old": lambda: np.random.RandomState(0),
    "numpy": lambda: np.random.default_rng(0),
    "torch": lambda: torch.Generator().manual_seed(0),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_the_data_sets_own_goes_on_as_without_a_probe(kind: str, inside: bool, tmp_path: Path) -> None:
    firsts = []
    for callback in (None, GeLoRACallback(FEW)):
        data: Any = Random(GENERATORS[kind]())
        data = Subset(data, range(len(data))) if inside else data
        collator = Reads()
        trainer_for(peft_model(), tmp_path, callback, train_dataset=data, data_collator=collator).train()
        firsts.append(collator.firsts)
    assert firsts[0] == firsts[1]
