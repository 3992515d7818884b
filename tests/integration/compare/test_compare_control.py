"""A control of the comparison itself: it finds an allocation that is needed, and finds nothing where nothing is.

Both outcomes are planted, and hold wherever a training goes: one by what low rank cannot express, one by symmetry.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.run import compare
from gelora_plugins.compare.task import Task
from gelora_plugins.findings.summary import Comparison
from tests.support.comparing import little_garbage, uneven
from tests.support.exchangeable import OneSeesConfig, OneSeesModel, build_exchangeable

quick = pytest.fixture(scope="module", autouse=True)(little_garbage)
OUTPUTS = 16
SETTINGS = Settings(rank=2, lora_alpha=16, allocations=("plan", "permuted"), methods=("lora",), batch_size=40, seeds=3)


def contrast(folder: Path, rows: list[dict[str, Any]], allocation: tuple[int, ...], settings: Settings) -> Comparison:
    held_out = len(rows) // 5
    task = Task("control", "regression", rows[held_out:], rows[:held_out], metric="loss")
    bench = Bench(str(folder / "model"), task, settings, folder / "out" / "control")
    plans = {"allocation": replace(uneven(bench), ranks=allocation)}
    return compare(bench.model, task, folder / "out", settings, plans=plans, progress=False)


def tokens(count: int, size: int) -> torch.Tensor:
    rng = random.Random(0)
    return torch.tensor([[rng.randrange(size) for _ in range(4)] for _ in range(count)])


def labelled(ids: torch.Tensor, labels: torch.Tensor) -> list[dict[str, Any]]:
    labels = labels / labels.std()
    return [{"input_ids": row, "label": label} for row, label in zip(ids.tolist(), labels.tolist(), strict=True)]


def test_an_allocation_that_the_blocks_need_beats_its_permutations(tmp_path: Path) -> None:
    """The answer is a map of rank 15, all its directions alike, of what the last block alone sees.

    With rank 1 there no training can have a lower loss than the best answers of rank 1 to the test rows, four fifths
    of that of no answer; with rank 16 the loss can be 0, and the problem is a linear one. Half is halfway to it.
    """
    OneSeesModel(OneSeesConfig(num_labels=OUTPUTS)).save_pretrained(tmp_path / "model")
    ids = tokens(200, OUTPUTS)
    turned, _ = torch.linalg.qr(torch.randn(OUTPUTS, OUTPUTS, generator=torch.Generator().manual_seed(0)))
    shares = torch.nn.functional.one_hot(ids, OUTPUTS).float().mean(1)
    rows = labelled(ids, (shares - shares.mean(1, keepdim=True)) @ turned)
    found = contrast(tmp_path, rows, (1, 1, 16), replace(SETTINGS, rates=(3e-2,), epochs=8))

    tested = torch.tensor([row["label"] for row in rows[:40]])
    nothing = tested.square().mean().item()
    floor = nothing - torch.linalg.matrix_norm(tested, 2).square().item() / tested.numel()
    assert floor > 0.75 * nothing
    ours, permuted = found.results
    assert min(permuted.scores) > 0.999 * floor
    assert max(ours.scores) < 0.5 * nothing
    assert found.contrast("control", "allocation", "allocation", "permuted").verdict == "better"


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


def test_an_allocation_of_exchangeable_blocks_is_equal_to_its_permutations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each rank draws the same adapter wherever it stands, a training and that of its permutation are one.

    They differ by the order of float32 sums of three, 2^-24 of a value, which a few steps cannot raise to the margin.
    Other rows, another order of them, another head, rate or scaling would be far beyond it.
    """
    build_exchangeable(OUTPUTS).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("gelora_plugins.compare.train._constant", lambda *_: float("inf"))  # its labels are random
    monkeypatch.setattr("gelora_plugins.compare.train.get_peft_model", with_draws_of_the_rank)
    ids = tokens(100, 97)
    labels = torch.randn(len(ids), OUTPUTS, generator=torch.Generator().manual_seed(0))
    settings = replace(SETTINGS, rates=(3e-3,), epochs=4, margin=1e-3)
    found = contrast(tmp_path, labelled(ids, labels), (6, 1, 1), settings)
    assert found.contrast("control", "allocation", "allocation", "permuted").verdict.startswith("equal within")
    ours, _ = found.results
    assert len(set(ours.scores)) == 3


def with_draws_of_the_rank(model: Any, config: LoraConfig) -> Any:
    wrapped = get_peft_model(model, config)
    seed = torch.initial_seed()
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            place, matrix = int(name.rpartition(".")[2]), module.lora_A["default"].weight
            generator = torch.Generator().manual_seed(1000 * seed + 10 * len(matrix) + place)
            matrix.data = torch.randn(matrix.shape, generator=generator) / matrix.shape[1] ** 0.5
    return wrapped
