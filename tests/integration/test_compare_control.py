"""A control of the comparison itself: it finds an allocation that is needed, and finds nothing where nothing is.

The labels are what a teacher answers: the student's own weights and, in some blocks, an update of known rank.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gelora_plugins import GeLoRAConfig
from gelora_plugins.compare import compare, measured, planned
from gelora_plugins.compare_bench import Bench, Settings
from gelora_plugins.compare_report import Contrast
from gelora_plugins.compare_tasks import Task
from tests.tiny import build

OUTPUTS, VOCABULARY = 16, 20
MARGIN = 0.01  # the variance of the labels is 1; where a block stands makes a difference of half of this


def student(spread: float) -> Any:
    """Three blocks of 32 features, without dropout; `spread` is the standard deviation of its weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "initializer_range": spread, "num_labels": OUTPUTS}
    return build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes).eval()


def with_updates(model: Any, ranks: Sequence[int], size: float) -> Any:
    """The model with a random update of `ranks[i]` in every linear map of block i; none where it is 0."""
    generator = torch.Generator().manual_seed(1)
    for layer, rank in zip(model.bert.encoder.layer, ranks, strict=True):
        for module in layer.modules():
            if isinstance(module, nn.Linear) and rank:
                rows, columns = module.weight.shape
                left, right = (torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
                module.weight.data += size * left @ right / (rank * columns) ** 0.5
    return model


def answers(teacher: Any, count: int, length: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    ids = [[rng.randrange(3, 3 + VOCABULARY) for _ in range(length)] for _ in range(count)]
    with torch.no_grad():
        found = teacher(input_ids=torch.tensor(ids)).logits
    found = (found - found.mean(0)) / found.std()
    return [{"input_ids": row, "label": label} for row, label in zip(ids, found.tolist(), strict=True)]


def contrast(
    folder: Path, rows: list[dict[str, Any]], allocation: tuple[int, ...], rate: float, epochs: int
) -> Contrast:
    held_out = len(rows) // 5
    task = Task("control", "regression", rows[held_out:], rows[:held_out], metric="loss")
    settings = Settings(
        rank=2,
        lora_alpha=4,
        methods=("plan", "permuted"),
        rates=(rate,),
        epochs=epochs,
        batch_size=32,
        seeds=8,
        margin=MARGIN,
    )
    bench = Bench(str(folder / "model"), task, settings, folder / "out" / "control")
    config = GeLoRAConfig()
    plan = planned(bench, measured(bench, config, progress=False), config, "uniform")
    plans = {"allocation": replace(plan, ranks=allocation, rank_changes=())}
    found = compare(bench.model, task, folder / "out", settings, plans=plans, progress=False)
    return found.contrast("control", "allocation", "allocation", "permuted")


def test_an_allocation_that_the_blocks_need_beats_its_permutations(tmp_path: Path) -> None:
    model = student(0.3)
    model.save_pretrained(tmp_path / "model")
    rows = answers(with_updates(model, (0, 0, 16), size=1.0), 3200, length=4)
    found = contrast(tmp_path, rows, (1, 1, 16), rate=5e-3, epochs=3)
    assert found.verdict == "better", str(found)


def test_an_allocation_that_no_block_needs_is_equal_to_its_permutations(tmp_path: Path) -> None:
    model = student(0.02)  # so small that a block does the same wherever it stands
    model.save_pretrained(tmp_path / "model")
    rows = answers(with_updates(model, (1, 1, 1), size=0.5), 800, length=8)
    found = contrast(tmp_path, rows, (6, 1, 1), rate=3e-3, epochs=8)
    assert found.verdict.startswith("equal within"), str(found)
