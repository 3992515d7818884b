"""A control of the comparison itself: it finds an allocation that is needed, and finds nothing where nothing is.

The labels are what a teacher answers: the student's own weights and, in some blocks, an update of known rank.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gelora_plugins import GeLoRAConfig
from gelora_plugins.compare import compare, measured, planned
from gelora_plugins.compare_bench import Bench, Settings
from gelora_plugins.compare_report import Contrast
from gelora_plugins.compare_tasks import Task
from tests.exchangeable import build_exchangeable
from tests.tiny import build

OUTPUTS, VOCABULARY = 16, 20


def with_updates(model: Any, blocks: nn.ModuleList, ranks: Sequence[int], size: float) -> Any:
    """The model with a random update of `ranks[i]` in every linear map of `blocks[i]`; none where it is 0."""
    generator = torch.Generator().manual_seed(1)
    for block, rank in zip(blocks, ranks, strict=True):
        for module in block.modules():
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
    )
    bench = Bench(str(folder / "model"), task, settings, folder / "out" / "control")
    config = GeLoRAConfig()
    plan = planned(bench, measured(bench, config, progress=False), config, "uniform")
    plans = {"allocation": replace(plan, ranks=allocation, rank_changes=())}
    found = compare(bench.model, task, folder / "out", settings, plans=plans, progress=False)
    return found.contrast("control", "allocation", "allocation", "permuted")


def test_an_allocation_that_the_blocks_need_beats_its_permutations(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_labels": OUTPUTS}
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes).eval()
    model.save_pretrained(tmp_path / "model")
    rows = answers(with_updates(model, model.bert.encoder.layer, (0, 0, 16), size=1.0), 3200, length=4)
    found = contrast(tmp_path, rows, (1, 1, 16), rate=5e-3, epochs=3)
    assert found.verdict == "better", str(found)


def test_exchangeable_blocks_answer_the_same_with_their_adapters_exchanged() -> None:
    ranks = {r"blocks\.0\..*": 6}
    options = {"r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks, "init_lora_weights": False}
    model: Any = get_peft_model(
        build_exchangeable(OUTPUTS), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **options)
    ).eval()
    blocks = model.get_base_model().blocks
    first, last = ([p for name, p in block.named_parameters() if "lora_" in name] for block in (blocks[0], blocks[2]))
    ids = torch.arange(24).reshape(3, 8)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for ours, theirs in zip(first, last, strict=True):
            ours.data, theirs.data = theirs.data, ours.data
        after = model(input_ids=ids).logits
        with model.disable_adapter():
            without = model(input_ids=ids).logits
    assert [len(p) for p in last] == [6, 32, 6, 32]
    assert torch.allclose(before, after, rtol=0, atol=1e-5)
    assert not torch.allclose(before, without, rtol=0, atol=0.1)


def test_an_allocation_of_exchangeable_blocks_is_equal_to_its_permutations(tmp_path: Path) -> None:
    """The true difference is 0, whatever the blocks need; one set of seeds in twenty shows one all the same."""
    model = build_exchangeable(OUTPUTS)
    model.save_pretrained(tmp_path / "model")
    rows = answers(with_updates(model, model.blocks, (1, 1, 1), size=0.5), 800, length=8)
    found = contrast(tmp_path, rows, (6, 1, 1), rate=3e-3, epochs=8)
    assert found.verdict.startswith("equal within"), str(found)
