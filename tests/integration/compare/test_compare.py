"""`gelora compare` on tiny models, trained: equal parameters, the same data order, the same run twice.

No test asserts where a training goes. What is recorded and said of given scores is in tests/unit/compare/.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from gelora_plugins import cli
from gelora_plugins.compare.allocations import lora
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.run import compare
from gelora_plugins.compare.task import Task
from gelora_plugins.compare.train import (
    adapted,
    attempt,
    chooses_ranks,
    first_parameters,
    fit,
    head_of,
    measure_eva,
    run,
)
from gelora_plugins.findings.arms import Recipe
from gelora_plugins.findings.record import Run, read_lines
from gelora_plugins.plugins import available
from tests.support.comparing import SETTINGS, UNEVEN, compare_tiny, little_garbage, rows, save_model, tiny_task, uneven
from tests.support.tiny import build
from tests.support.training import layers

quick = pytest.fixture(scope="module", autouse=True)(little_garbage)
ONE_RATE = replace(SETTINGS, rates=(1e-2,), seeds=1)


@pytest.fixture(autouse=True)
def nothing_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a tiny model gets below the constant answer's loss is where its training goes."""
    monkeypatch.setattr("gelora_plugins.compare.train._constant", lambda *_: math.inf)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def bench(model: str, tmp_path: Path) -> Bench:
    return Bench(model, tiny_task(), ONE_RATE, tmp_path / "tiny")


def test_all_methods_of_a_row_are_trained_with_equal_parameters(bench: Bench, model: str, tmp_path: Path) -> None:
    found = compare_tiny(model, tmp_path, ONE_RATE)
    assert not found.gaps
    results = [result for result in found.results if result.row == "mine"]
    assert [result.method for result in results] == ["mine", "uniform", "permuted", "reversed", "eva", "adalora"]
    assert {result.parameters for result in results} == {12 * 4 * 32}
    ranks = {result.method: result.ranks for result in results}
    assert ranks["mine"] == (UNEVEN,)
    assert ranks["reversed"] == (UNEVEN[::-1],)
    assert sum(ranks["eva"][0]) == pytest.approx(12)
    assert [result.row for result in found.results[6:]] == ["uniform r = 4", "full"]
    assert found.results[7].parameters == bench.num_parameters


def test_training_methods_are_arms_and_rate_only_has_the_scalings_of_the_plan(
    bench: Bench, model: str, tmp_path: Path
) -> None:
    axes = {"allocations": ("plan", "uniform", "rate_only"), "methods": ("lora", "flat_lora sigma=0", "flat_lora")}
    found = compare_tiny(model, tmp_path, replace(ONE_RATE, **axes))
    scores = {result.method: result.scores for result in found.results}
    assert list(scores) == [
        *("mine", "uniform", "rate_only"),
        *("flat_lora sigma=0 on mine", "flat_lora sigma=0", "flat_lora sigma=0 on rate_only"),
        *("flat_lora on mine", "flat_lora", "flat_lora on rate_only"),
    ]
    for line in read_lines(tmp_path / "tiny" / "runs.jsonl").values():
        assert len(line["parts"]) == len(bench.test)
        assert math.fsum(line["parts"]) / len(bench.test) == pytest.approx(line["score"], abs=1e-12)
    runs = {line["method"]: line["loss"] for line in read_lines(tmp_path / "tiny" / "runs.jsonl").values()}
    assert runs["flat_lora sigma=0 on mine"] == runs["mine"] != runs["flat_lora on mine"]
    assert len({result.parameters for result in found.results}) == 1
    assert found.contrast("tiny", "mine", "flat_lora on mine", "mine").difference.seeds == 1
    scaled = adapted(bench, replace(lora((4, 4, 4), bench.sites), scalings=(2.0, 1.0, 0.5)), 0)
    scalings = dict.fromkeys(layer.scaling["default"] for layer in layers(scaled).values())
    assert list(scalings) == [bench.settings.scaling * factor for factor in (2, 1, 0.5)]


@pytest.mark.parametrize("name", available("method"))
def test_every_training_method_ends_at_the_parameters_of_uniform_ranks(bench: Bench, name: str) -> None:
    options = {"cola": " knots=2", "diffora": " search=1", "beamlora": " period=2", "xgblora": " blocks=3"}
    options["sora"] = " shrinkage=0"  # or it prunes more than it is asked to
    recipe = replace(lora((4, 4, 4), bench.sites), kind=name + options.get(name, ""))
    found = run(bench, Run("r = 4", name, recipe, 0, 1e-2, choosing=False))  # which raises where it does not
    assert math.isfinite(found["loss"])
    first = first_parameters(bench, recipe)
    assert (first > recipe.parameters) == chooses_ranks(recipe.kind)


def test_a_method_that_chooses_ranks_stands_once_and_what_it_trains_at_first_is_said(
    model: str, tmp_path: Path
) -> None:
    axes = {"allocations": ("plan", "permuted"), "methods": ("lora", "adalora")}
    found = compare_tiny(model, tmp_path, replace(ONE_RATE, **axes))
    assert [result.method for result in found.results] == ["mine", "permuted", "adalora"]
    assert any(
        "adalora trains 1.5 times these parameters at first, and ends with as many" in line for line in found.lines()
    )


def test_without_a_plan_methods_are_compared_at_the_own_rank(model: str, tmp_path: Path) -> None:
    axes = {"allocations": ("uniform",), "methods": ("lora", "flat_lora")}
    found = compare(model, tiny_task(), tmp_path, replace(ONE_RATE, **axes), progress=False)
    assert [(result.row, result.method) for result in found.results] == [("r = 4", "uniform"), ("r = 4", "flat_lora")]
    assert not list(tmp_path.glob("tiny/cache-*/profile-*")), "nothing was measured"


def test_the_head_the_rows_and_their_order_are_the_seeds_and_not_the_methods(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = replace(bench, settings=replace(ONE_RATE, rows_per_seed=24))
    eva, _, _ = measure_eva(bench, 12 * 4 * 32)
    uniform = lora((4, 4, 4), bench.sites)
    heads, orders = [], []
    for recipe in (uniform, lora(UNEVEN, bench.sites), eva):
        heads.append(head_weight(adapted(bench, recipe, 1)))
        orders.append(batches_of(bench, recipe, 1, monkeypatch)[0])
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert orders[0] == orders[1] == orders[2]
    assert sorted(row for batch in orders[0] for row in batch) == sorted(row["input_ids"] for row in bench.drawn(1))
    assert not torch.equal(head_weight(adapted(bench, uniform, 2)), heads[0])
    other, _ = batches_of(bench, uniform, 2, monkeypatch)
    assert sorted(row for batch in other for row in batch) == sorted(row["input_ids"] for row in bench.drawn(2))
    assert bench.drawn(1) != bench.drawn(2)
    assert all(row in bench.train for row in bench.drawn(2))


def test_a_run_that_chooses_a_rate_sees_no_test_row_and_makes_as_many_steps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = []
    for seed in range(1000, 1005):
        trained, scored = batches_of(bench, lora(UNEVEN, bench.sites), seed, monkeypatch, choosing=True)
        trained, scored = (sorted(row for batch in batches for row in batch) for batches in (trained, scored))
        assert len(scored) == 8
        assert sorted([*{tuple(row) for row in trained}, *map(tuple, scored)]) == rows_of(bench.train)
        held_out += map(tuple, scored)
    assert sorted(held_out) == rows_of(bench.train), "each seed holds out another fifth"


def rows_of(encoded: Any) -> list[tuple[int, ...]]:
    return sorted(tuple(row["input_ids"]) for row in encoded)


def head_weight(model: nn.Module) -> torch.Tensor:
    return next(p for name, p in model.named_parameters() if "modules_to_save.default.weight" in name)


def batches_of(
    bench: Bench, recipe: Any, seed: int, monkeypatch: pytest.MonkeyPatch, *, choosing: bool = False
) -> tuple[Any, Any]:
    """The rows of each batch: of the training, which makes a step of each, and of the evaluation, which is one."""
    seen: list[list[list[int]]] = []
    collate, training_step, steps = type(bench.collator).__call__, Trainer.training_step, []

    def watched(self: Any, rows: Any) -> Any:
        seen.append([row["input_ids"] for row in rows])
        return collate(self, rows)

    def step(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        steps.append(len(inputs["labels"]))
        return training_step(self, model, inputs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(bench.collator), "__call__", watched)
        patch.setattr(Trainer, "training_step", step)
        run(bench, Run("row", "method", recipe, seed, 1e-3, choosing=choosing))
    assert steps == [8] * ((bench.settings.rows_per_seed or len(bench.train)) // 8)
    return seen[: len(steps)], seen[-1:]


# The head


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_head_is_trained_at_a_rate_of_its_own(kind: str, bench: Bench) -> None:
    """The first steps of AdamW are as long as the rate, whatever the gradient; that of a warm-up is 0."""
    recipe = lora(UNEVEN, bench.sites) if kind == "lora" else Recipe("full", bench.num_parameters)
    model = adapted(bench, recipe, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    head = {id(p) for p in head_of(model)}
    fit(bench, model, Run("row", "method", recipe, 0, 1e-9, choosing=False, head_rate=1e-2), bench.train, 2)
    moved = {True: [0.0], False: [0.0]}
    for name, p in model.named_parameters():
        if name in before:
            moved[id(p) in head].append((p - before[name]).abs().max().item())
    assert max(moved[False]) < 1e-6
    assert 1e-4 < max(moved[True]) <= 1.01e-2
    assert [tuple(p.shape) for p in head_of(model)] == [(2, 16), (2,)]


def test_a_causal_model_has_no_head_and_is_trained_at_one_rate(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    documents = [{"input_ids": row["input_ids"]} for row in rows(20, 0)]
    task = Task("text", "causal-lm", documents, documents[:10])
    settings = replace(ONE_RATE, target_modules="all-linear")
    bench = Bench(str(tmp_path / "model"), task, settings, tmp_path / "text")
    recipe = lora(UNEVEN, bench.sites)
    made = Run("row", "method", recipe, 0, 1e-3, choosing=False)
    assert head_of(adapted(bench, recipe, 0)) == []
    assert run(bench, replace(made, head_rate=0.5))["loss"] == run(bench, made)["loss"]


def test_a_run_is_repeatable_here_and_in_processes_side_by_side(bench: Bench, model: str, tmp_path: Path) -> None:
    settings = replace(ONE_RATE, allocations=("plan",), methods=("lora",), seeds=2)
    plans = {"mine": uneven(bench)}
    compare(model, bench.task, tmp_path, settings, plans=plans, jobs=2, progress=False)
    # Sums are split among threads, so their rounding hangs on how many there are: each of two processes has half.
    threads = torch.get_num_threads()
    made = [Run("mine", "mine", lora(UNEVEN, bench.sites), seed, 1e-2, choosing=False) for seed in (0, 1)]
    again = [attempt(bench, one, max(1, threads // 2)) for one in made]
    torch.set_num_threads(threads)
    recorded = [json.loads(line) for line in (tmp_path / "tiny" / "runs.jsonl").read_text().splitlines()]
    for name in ("score", "loss"):
        assert {line["seed"]: line[name] for line in recorded} == {0: again[0][name], 1: again[1][name]}
    assert again[0]["head_parameters"] == 16 * 2 + 2


def test_bfloat16_is_another_run_with_nearly_the_same_result(bench: Bench) -> None:
    """At a rate that moves nothing the losses differ by the rounding of the forward pass: 2^-8 of a value, 3 blocks."""
    mixed = replace(bench, settings=replace(ONE_RATE, bf16=True))
    first, second = (
        run(b, Run("mine", "mine", lora(UNEVEN, b.sites), 0, 1e-9, choosing=False)) for b in (bench, mixed)
    )
    assert first["loss"] != second["loss"]
    assert second["loss"] == pytest.approx(first["loss"], rel=0.05)
    assert bench.cache != mixed.cache


def test_evas_ranks_cost_what_was_asked_where_modules_differ_in_size(bench: Bench) -> None:
    bench = replace(bench, settings=replace(ONE_RATE, target_modules="all-linear"))
    asked = lora((8, 8, 8), bench.sites).parameters
    recipe, ranks, _ = measure_eva(bench, asked)
    assert abs(recipe.parameters - asked) < 0.01 * asked
    costs = {name: linear.in_features + linear.out_features for name, linear in bench.targets.items()}
    assert len(set(costs.values())) > 1
    assert sum(rank * costs[name] for name, rank in ranks.items()) == recipe.parameters
    assert run(bench, Run("mine", "eva", recipe, 0, 1e-3, choosing=False))["lora_parameters"] == recipe.parameters


def test_weights_that_are_nan_have_no_score(tmp_path: Path) -> None:
    """Their argmax is label 0, which is right for a share of the rows."""
    broken = build("bert").base_model
    broken.encoder.layer[1].output.dense.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "model")
    bench = Bench(str(tmp_path / "model"), tiny_task(), ONE_RATE, tmp_path / "tiny")
    found = run(bench, Run("mine", "mine", lora(UNEVEN, bench.sites), 0, 1e-3, choosing=False))
    assert (found["score"], found["loss"]) == (None, None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n a lot"),
            "OutOfMemoryError: CUDA out of",
        ),
        (ValueError(), "ValueError: it says no more."),
    ],
)
def test_whatever_a_run_raises_is_a_reason(
    error: Exception, said: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("gelora_plugins.compare.train.run", fail)
    made = Run("mine", "uniform", lora(UNEVEN, bench.sites), 3, 1e-3, choosing=False)
    assert str(attempt(bench, made)).startswith(said)
    assert f"mine, uniform, seed 3, rate 0.001 failed: {said}" in caplog.text


def test_the_command_line_compares_causal_language_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row["input_ids"]}) + "\n" for row in rows(90, 0)))
    arguments = "--task causal-lm --name text --rank 4 --allocations plan,uniform --methods lora,eva"
    arguments += " --seeds 1 --rates 1e-2 --epochs 1 --rows-per-seed 40 --rate-seeds 2"
    command = ["gelora", "compare", str(tmp_path / "model"), str(data), *arguments.split(), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "| budget: uniform |" in shown
    assert "text, budget: budget against uniform: no verdict: 1 seeds, at least 3 are needed" in shown
    assert "EVA is left out. EVA comes to" in shown, "at rank 1, and with modules of several sizes, it cannot be equal"
    assert "for each seed 40 of 72 training rows" in (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    settings = json.loads((tmp_path / "out" / "text" / "experiment.json").read_text(encoding="utf-8"))["settings"]
    assert settings["rate_seeds"] == 2


def test_a_causal_row_that_trains_on_nothing_is_in_no_batch_and_is_said(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    documents = [{"input_ids": row["input_ids"]} for row in rows(40, 0)]
    task = Task("text", "causal-lm", [*documents, {"input_ids": [5]}], documents[:10])
    settings = replace(ONE_RATE, allocations=("plan",), methods=("lora",), target_modules="all-linear")
    bench = Bench(str(tmp_path / "model"), task, settings, tmp_path / "text")
    found = compare(bench.model, task, tmp_path, settings, plans={"mine": uneven(bench)}, progress=False)
    assert len(found.results) == 1
    assert any(line.startswith("text: 1 of 41 training rows are left out: max_length") for line in found.lines())
