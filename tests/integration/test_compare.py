"""`gelora compare` on tiny models: equal parameters, the same data order, going on, what is shown."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from gelora_plugins import GeLoRAConfig, cli
from gelora_plugins.compare import Record, Run, compare, measured, planned, read_lines
from gelora_plugins.compare_bench import Bench, Settings
from gelora_plugins.compare_methods import lora
from gelora_plugins.compare_report import CAVEAT, CAVEAT_DRAWN, Comparison
from gelora_plugins.compare_tasks import Task
from gelora_plugins.compare_training import adapted, measure_eva, run
from gelora_plugins.errors import ConfigError, PlanError, ProbeError
from gelora_plugins.ranks import RankPlan
from tests.tiny import build

ATTENTION = "query,key,value,attention.output.dense"  # all 16 by 16 in the tiny model
SETTINGS = Settings(
    rank=4,
    lora_alpha=8,
    target_modules=ATTENTION,
    seeds=3,
    rate_seeds=1,
    epochs=1,
    batch_size=8,
    rates=(1e-3, 1e-2),
    grid=(4,),
)
UNEVEN = (7, 3, 2)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    documents = [[rng.randrange(3, 97) for _ in range(rng.randint(4, 12))] for _ in range(count)]
    return [{"input_ids": ids, "label": int(ids[1] > 50)} for ids in documents]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    build("bert").base_model.save_pretrained(directory)  # without a head, so that each seed draws one
    return str(directory)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task("tiny", "classification", rows(80, 0), rows(40, 1))


def uneven(bench: Bench) -> RankPlan:
    profile = measured(bench, GeLoRAConfig(), progress=False)
    return replace(planned(bench, profile, GeLoRAConfig(), "uniform"), ranks=UNEVEN, rank_changes=())


@pytest.fixture(scope="module")
def found(model: str, task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    output = tmp_path_factory.mktemp("comparison")
    bench = Bench(model, task, SETTINGS, output / "tiny")
    return compare(model, task, output, SETTINGS, plans={"mine": uneven(bench)}, progress=False), output


# What is compared


def test_all_methods_of_a_row_are_trained_with_equal_parameters(found: tuple[Comparison, Path]) -> None:
    results = [result for result in found[0].results if result.row == "mine"]
    assert [result.method for result in results] == ["mine", "uniform", "permuted", "reversed", "eva", "adalora"]
    assert {result.parameters for result in results} == {12 * 4 * 32}
    ranks = {result.method: result.ranks for result in results}
    assert ranks["mine"] == (UNEVEN,)
    assert ranks["reversed"] == (UNEVEN[::-1],)
    assert len(ranks["permuted"]) == SETTINGS.seeds
    assert sum(ranks["eva"][0]) == pytest.approx(12)


def test_one_training_serves_every_row_that_has_it(found: tuple[Comparison, Path]) -> None:
    """Uniform rank 4 is the control of the plan and a row of the grid."""
    by_name = {(result.row, result.method): result.scores for result in found[0].results}
    assert by_name["mine", "uniform"] == by_name["uniform r = 4", "uniform"]
    lines = read_lines(found[1] / "tiny" / "runs.jsonl")
    assert len(lines) == len({line["key"] for line in lines})
    assert len(lines) == 7 * (2 + 3)  # mine, uniform, permuted, reversed, eva, adalora, full: rates, then seeds


def test_the_rate_is_chosen_on_training_rows_alone(found: tuple[Comparison, Path]) -> None:
    lines = read_lines(found[1] / "tiny" / "runs.jsonl")
    for method in ("mine", "eva", "adalora", "full"):
        choosing = {line["rate"]: line["score"] for line in lines if line["choosing"] and line["method"] == method}
        used = {line["rate"] for line in lines if not line["choosing"] and line["method"] == method}
        assert used == {max(sorted(choosing), key=lambda rate: choosing[rate])}
        assert set(choosing) == set(SETTINGS.rates)
        assert {round(16 * score, 6) % 1 for score in choosing.values()} == {0}, "16 rows are a fifth of 80"


def test_the_head_and_the_order_of_the_rows_are_the_seeds_and_not_the_methods(
    model: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(model, task, SETTINGS, tmp_path)
    eva, _, _ = measure_eva(bench, 12 * 4 * 32)
    heads, orders = [], []
    for recipe in (lora((4, 4, 4), bench.sites), lora(UNEVEN, bench.sites), eva):
        heads.append(head_of(adapted(bench, recipe, 1, 10)))
        orders.append(batches_of(bench, recipe, 1, monkeypatch))
    assert all(torch.equal(head, heads[0]) for head in heads)
    assert orders[0] == orders[1] == orders[2]
    assert not torch.equal(head_of(adapted(bench, lora((4, 4, 4), bench.sites), 2, 10)), heads[0])
    assert batches_of(bench, lora((4, 4, 4), bench.sites), 2, monkeypatch) != orders[0]


def test_seeds_draw_rows_of_their_own_and_methods_share_them(
    model: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(model, task, replace(SETTINGS, rows_per_seed=40), tmp_path)
    recipes = [lora(ranks, bench.sites) for ranks in ((4, 4, 4), UNEVEN)]
    for seed in (0, 1):
        drawn = sorted(row["input_ids"] for row in bench.drawn(seed))
        for recipe in recipes:
            batches = batches_of(bench, recipe, seed, monkeypatch)[:5]
            assert sorted(row for batch in batches for row in batch) == drawn
    assert bench.drawn(0) != bench.drawn(1)
    assert len(bench.drawn(0)) == 40
    assert all(row in bench.train for row in bench.drawn(1))


def test_a_rate_is_chosen_by_the_mean_of_its_seeds(model: str, task: Task, tmp_path: Path) -> None:
    settings = replace(SETTINGS, rate_seeds=3, rows_per_seed=50, methods=("plan",), seeds=1)
    plans = {"mine": uneven(Bench(model, task, settings, tmp_path / "tiny"))}
    found = compare(model, task, tmp_path, settings, plans=plans, progress=False)
    scores: dict[float, list[float]] = {rate: [] for rate in settings.rates}
    for line in read_lines(tmp_path / "tiny" / "runs.jsonl"):
        if line["choosing"]:
            scores[line["rate"]].append(line["score"])
    assert {len(of_rate) for of_rate in scores.values()} == {3}
    assert {round(10 * score, 6) % 1 for of_rate in scores.values() for score in of_rate} == {0}, "a fifth of 50"
    assert found.results[0].rate == max(settings.rates, key=lambda rate: (sum(scores[rate]), -rate))


def head_of(model: nn.Module) -> torch.Tensor:
    return next(p for name, p in model.named_parameters() if "modules_to_save.default.weight" in name)


def batches_of(bench: Bench, recipe: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    seen: list[list[list[int]]] = []
    collate = type(bench.collator).__call__

    def watched(self: Any, rows: Any) -> Any:
        seen.append([row["input_ids"] for row in rows])
        return collate(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(type(bench.collator), "__call__", watched)
        run(bench, recipe, seed, 1e-3, choosing=False)
    return seen[:10]  # the training batches; the test rows come after them


def test_a_run_is_repeatable(model: str, task: Task, tmp_path: Path) -> None:
    bench = Bench(model, task, SETTINGS, tmp_path)
    first, second = (run(bench, lora(UNEVEN, bench.sites), 0, 1e-2, choosing=False) for _ in range(2))
    assert (first["score"], first["loss"]) == (second["score"], second["loss"])
    assert first["head_parameters"] == 16 * 2 + 2


def test_bfloat16_is_another_run_with_nearly_the_same_result(model: str, task: Task, tmp_path: Path) -> None:
    exact = Bench(model, task, SETTINGS, tmp_path)
    mixed = replace(exact, settings=replace(SETTINGS, bf16=True))
    first, second = (run(bench, lora(UNEVEN, bench.sites), 0, 1e-3, choosing=False) for bench in (exact, mixed))
    assert first["loss"] != second["loss"]
    assert second["loss"] == pytest.approx(first["loss"], rel=0.02)
    assert exact.cache != mixed.cache


def test_evas_ranks_cost_what_was_asked_where_modules_differ_in_size(model: str, task: Task, tmp_path: Path) -> None:
    bench = Bench(model, task, replace(SETTINGS, target_modules="all-linear"), tmp_path)
    asked = lora((8, 8, 8), bench.sites).parameters
    recipe, ranks, _ = measure_eva(bench, asked)
    assert abs(recipe.parameters - asked) < 0.01 * asked
    costs = {name: linear.in_features + linear.out_features for name, linear in bench.targets.items()}
    assert len(set(costs.values())) > 1
    assert sum(rank * costs[name] for name, rank in ranks.items()) == recipe.parameters
    assert run(bench, recipe, 0, 1e-3, choosing=False)["lora_parameters"] == recipe.parameters


# Going on


def test_a_second_call_trains_nothing(
    found: tuple[Comparison, Path], model: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gelora_plugins.compare.run", lambda *args, **kwargs: pytest.fail("trained again"))
    plans = {"mine": uneven(Bench(model, task, SETTINGS, found[1] / "tiny"))}
    assert compare(model, task, found[1], SETTINGS, plans=plans, progress=False) == found[0]


def test_a_killed_comparison_goes_on_and_ends_with_the_same_scores(
    found: tuple[Comparison, Path], model: str, task: Task, tmp_path: Path
) -> None:
    recorded = (found[1] / "tiny" / "runs.jsonl").read_text()
    lines = recorded.splitlines(keepends=True)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "runs.jsonl").write_text("".join(lines[:-2]) + lines[-2][:50])  # torn within a line
    plans = {"mine": uneven(Bench(model, task, SETTINGS, tmp_path / "tiny"))}
    again = compare(model, task, tmp_path, SETTINGS, plans=plans, progress=False)
    assert [r.scores for r in again.results] == [r.scores for r in found[0].results]
    after = (tmp_path / "tiny" / "runs.jsonl").read_text().splitlines(keepends=True)
    assert after[:-2] == lines[:-2]
    assert len(after) == len(lines)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "a"}\nnot json\n{"key": "b"}\n')
    with pytest.raises(PlanError, match=r"Line 2 of .*runs.jsonl is not JSON.*Remove the line"):
        read_lines(path)


def test_other_settings_other_data_or_another_seed_are_another_run(model: str, task: Task, tmp_path: Path) -> None:
    made = Run("row", "method", lora(UNEVEN, Bench(model, task, SETTINGS, tmp_path).sites), 0, 1e-3, choosing=False)
    same = Bench(model, Task("tiny", "classification", rows(80, 0), rows(40, 1)), SETTINGS, tmp_path)
    others = [
        Bench(model, task, replace(SETTINGS, epochs=2), tmp_path),
        Bench(model, task, replace(SETTINGS, rows_per_seed=80), tmp_path),
        Bench(model, Task("tiny", "classification", rows(80, 2), rows(40, 1)), SETTINGS, tmp_path),
    ]
    key = made.key(same.identity)
    assert key == made.key(Bench(model, task, replace(SETTINGS, seeds=9), tmp_path).identity)
    assert "rows_per_seed" not in same.identity["training"], "runs that were recorded before it was an option"
    assert replace(made, row="another", method="name").key(same.identity) == key
    assert key not in {made.key(other.identity) for other in others}
    assert key not in {replace(made, seed=1).key(same.identity), replace(made, choosing=True).key(same.identity)}
    assert Record(tmp_path / "none.jsonl", same.identity).lines == {}


def test_more_rows_than_there_are_are_refused(model: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"rows_per_seed is 81; expected at most the 80 training rows"):
        Bench(model, task, replace(SETTINGS, rows_per_seed=81), tmp_path)
    with pytest.raises(ConfigError, match=r"rows_per_seed is 9; expected at least 10"):
        replace(SETTINGS, rows_per_seed=9)


def test_an_unfinished_comparison_says_so(found: tuple[Comparison, Path], tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for name in ("experiment.json", "runs.jsonl"):
        text = (found[1] / "tiny" / name).read_text()
        (tmp_path / "tiny" / name).write_text(text if name == "experiment.json" else text[: len(text) // 2] + "\n")
    lines = (tmp_path / "tiny" / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tiny" / "runs.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(PlanError, match=r"tiny: \d runs of mine, .* are not done. Run the same command again"):
        Comparison.read(tmp_path)


def test_processes_side_by_side_give_the_same_scores(
    found: tuple[Comparison, Path], model: str, task: Task, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, methods=("plan",), rates=(1e-2,), seeds=2)
    plans = {"mine": uneven(Bench(model, task, settings, tmp_path / "tiny"))}
    alone = compare(model, task, tmp_path / "alone", settings, plans=plans, progress=False)
    together = compare(model, task, tmp_path / "together", settings, plans=plans, jobs=2, progress=False)
    assert together.results[0].scores == alone.results[0].scores


def test_no_process_outlives_a_comparison_that_is_killed() -> None:
    script = """if __name__ == "__main__":
        import os, time
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from gelora_plugins.compare import start_worker
        pool = ProcessPoolExecutor(1, get_context("spawn"), start_worker, (1,))
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        worker = int(killed.stdout.readline())
        assert is_alive(worker)
        killed.kill()
    deadline = time.monotonic() + 30
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


def is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


# What is shown


def test_the_report_is_written_and_read_again(found: tuple[Comparison, Path], tmp_path: Path) -> None:
    paths = found[0].write(tmp_path)
    assert [path.name for path in paths] == ["comparison.json", "comparison.md", "pareto.png", "patterns.png"]
    assert all(path.stat().st_size > 0 for path in paths)
    summary = json.loads(paths[0].read_text())
    assert summary["results"][0]["scores"] == list(found[0].results[0].scores)
    text = paths[1].read_text()
    assert "| mine: permuted | 1,536 |" in text
    assert "tiny, mine: mine is " in text
    assert "80 training rows, 40 test rows, 3 seeds" in text
    assert text.endswith(f"- {CAVEAT}\n")


def test_the_report_says_whose_rows_they_are(found: tuple[Comparison, Path], tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    experiment = json.loads((found[1] / "tiny" / "experiment.json").read_text())
    experiment["settings"]["rows_per_seed"] = 40
    (tmp_path / "tiny" / "experiment.json").write_text(json.dumps(experiment))
    (tmp_path / "tiny" / "runs.jsonl").write_text((found[1] / "tiny" / "runs.jsonl").read_text())
    text = Comparison.read(tmp_path).to_markdown()
    assert "for each seed 40 of 80 training rows, 40 test rows" in text
    assert text.endswith(f"- {CAVEAT_DRAWN}\n")


def test_several_tasks_are_counted_in_one_line(found: tuple[Comparison, Path], tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        experiment = json.loads((found[1] / "tiny" / "experiment.json").read_text())
        experiment["task"]["name"] = name
        (tmp_path / name / "experiment.json").write_text(json.dumps(experiment))
        (tmp_path / name / "runs.jsonl").write_text((found[1] / "tiny" / "runs.jsonl").read_text())
    verdict = found[0].contrast("tiny", "mine", "mine", "uniform").verdict
    assert verdict.startswith("equal")
    line = "mine: mine against uniform over 2 tasks: better on 0, equal on 2, worse on 0."
    assert Comparison.read(tmp_path).lines()[0] == line
    assert line not in found[0].lines()


def test_the_command_line_compares_causal_language_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row["input_ids"]}) + "\n" for row in rows(90, 0)))
    arguments = "--task causal-lm --name text --methods plan,uniform,eva --seeds 3 --rates 1e-2 --epochs 1 --rank 4"
    arguments += " --rows-per-seed 40 --rate-seeds 2"
    command = ["gelora", "compare", str(tmp_path / "model"), str(data), *arguments.split(), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "| budget: uniform |" in shown
    assert "text, budget: budget is " in shown
    assert "EVA is left out. EVA comes to" in shown, "at rank 1, and with modules of several sizes, it cannot be equal"
    assert "for each seed 40 of 72 training rows" in (tmp_path / "out" / "comparison.md").read_text()
    assert json.loads((tmp_path / "out" / "text" / "experiment.json").read_text())["settings"]["rate_seeds"] == 2
