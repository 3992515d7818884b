"""What a comparison records, goes on with, and never loses. Trainings are only said: their scores are chosen here."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins.compare.allocations import lora
from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.run import compare, design
from gelora_plugins.compare.task import Task
from gelora_plugins.errors import ConfigError, PlanError, ProbeError, WriteError
from gelora_plugins.findings.record import Record, Run, locked, read_lines
from gelora_plugins.ranks.guard import late_note
from tests.support.comparing import (
    PLAIN,
    SETTINGS,
    UNEVEN,
    WHOLE,
    Say,
    compare_tiny,
    methods_of,
    rows,
    said,
    save_model,
    tiny_task,
    uneven,
    usual,
)
from tests.support.plans import make_plan

LINES = 3 * 3  # mine, uniform (of the grid too), permuted: one for each seed


# What is trained


def test_one_training_serves_every_row_that_has_it(model: str, tmp_path: Path, say: Say) -> None:
    """Uniform rank 4 is the control of the plan and a row of the grid."""
    asked = say(said(usual))
    found = compare_tiny(model, tmp_path, PLAIN)
    assert methods_of(found) == WHOLE
    assert found.results[1].scores == found.results[3].scores
    assert len(asked) == len({(made.recipe, made.seed, made.rate, made.choosing) for made in asked}) == LINES
    assert len((tmp_path / "tiny" / "runs.jsonl").read_text().splitlines()) == LINES


def test_a_second_call_trains_nothing(model: str, tmp_path: Path, say: Say) -> None:
    say(said(usual))
    first = compare_tiny(model, tmp_path, PLAIN)
    asked = say(said(usual))
    assert compare_tiny(model, tmp_path, PLAIN) == first
    assert not asked


def test_a_killed_comparison_goes_on_where_it_was(model: str, tmp_path: Path, say: Say) -> None:
    say(said(usual))
    first = compare_tiny(model, tmp_path, PLAIN)
    path = tmp_path / "tiny" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:50])  # torn within a line
    asked = say(said(usual))
    assert compare_tiny(model, tmp_path, PLAIN) == first
    assert len(asked) == 2
    assert path.read_text().splitlines(keepends=True)[:-2] == lines[:-2]


@pytest.mark.parametrize(("line", "words"), [("not json", "is not JSON"), ("[1]", "is no run"), ("{}", "is no run")])
def test_a_damaged_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f'{{"key": "a", "score": 1, "loss": 1}}\n{line}\n{{"key": "b", "score": 1, "loss": 1}}\n')
    with pytest.raises(PlanError, match=rf"Line 2 of .*runs.jsonl {words}.*Remove the line"):
        read_lines(path)


def test_who_only_reads_leaves_a_torn_line_to_who_is_writing_it(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "a", "score": 1, "loss": 1}\n{"key": "b", ')
    before = path.read_bytes()
    assert list(read_lines(path)) == ["a"]
    assert path.read_bytes() == before
    assert list(Record(path, {}).lines) == ["a"]
    assert path.read_bytes() == before[:36]


def test_everything_that_a_score_depends_on_makes_another_run(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(model, tiny_task(), SETTINGS, tmp_path)
    made = Run("row", "method", lora(UNEVEN, bench.sites), 0, 1e-3, choosing=False)
    key = made.key(bench.identity)

    def key_with(task: Task | None = None, **options: Any) -> str:
        return made.key(Bench(model, task or tiny_task(), replace(SETTINGS, **options), tmp_path).identity)

    assert key == key_with(seeds=9) == replace(made, row="another", method="name").key(bench.identity)
    assert key not in {key_with(epochs=2), key_with(rows_per_seed=40), key_with(task=tiny_task(max_length=99))}
    assert key not in {replace(made, seed=1).key(bench.identity), replace(made, choosing=True).key(bench.identity)}
    with monkeypatch.context() as patch:
        patch.setattr("gelora_plugins.compare.bench.device", lambda: "NVIDIA H100")
        assert key != key_with()
    for package in ("gelora", "torch", "transformers", "peft"):
        with monkeypatch.context() as patch:
            others = {**bench.identity["versions"], package: "9.9"}
            patch.setattr("gelora_plugins.compare.bench.versions", lambda others=others: others)
            assert key != key_with(), package


def test_runs_of_another_version_are_not_taken_and_a_warning_says_so(
    model: str, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    say(said(usual))
    compare_tiny(model, tmp_path, PLAIN)
    assert not caplog.records
    monkeypatch.setattr("gelora_plugins.compare.bench.versions", lambda: {"gelora": "9.9"})
    asked = say(said(usual))
    with caplog.at_level(logging.WARNING):
        compare_tiny(model, tmp_path, PLAIN)
    assert len(asked) == LINES
    assert f"The {LINES} runs that are recorded in" in caplog.text


def test_more_rows_than_there_are_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"rows_per_seed is 41; expected at most the 40 training rows"):
        Bench(model, tiny_task(), replace(SETTINGS, rows_per_seed=41), tmp_path)
    with pytest.raises(ConfigError, match=r"rows_per_seed is 9; expected at least 10"):
        replace(SETTINGS, rows_per_seed=9)


@pytest.mark.parametrize(
    "option",
    [
        {"rates": (float("inf"),)},
        {"rates": (float("nan"), 1.0)},
        {"margin": -1.0},
        {"head_rate": -1.0},
        {"head_rate": float("nan")},
    ],
)
def test_settings_that_are_no_numbers_to_train_with_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        Settings(**option)


# What would be overwritten


def test_two_comparisons_in_one_folder_are_refused(model: str, tmp_path: Path, say: Say) -> None:
    say(said(usual))
    with locked(tmp_path / "tiny"), pytest.raises(WriteError, match=r"Another comparison is at work in .*tiny"):
        compare_tiny(model, tmp_path, PLAIN)
    assert methods_of(compare_tiny(model, tmp_path, PLAIN)) == WHOLE, "the lock is gone"
    assert methods_of(compare_tiny(model, tmp_path, PLAIN)) == WHOLE, "and again"


def test_a_comparison_that_fails_lets_go_of_its_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_an_output_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written to"), locked(tmp_path / "file" / "tiny"):
        pass


def test_other_rows_or_another_model_under_one_name_are_refused(
    model: str, tmp_path: Path, say: Say, tmp_path_factory: pytest.TempPathFactory
) -> None:
    say(said(usual))
    compare_tiny(model, tmp_path, PLAIN)
    report = (tmp_path / "tiny" / "experiment.json").read_bytes()
    other_rows = Task("tiny", "classification", rows(40, 2), rows(20, 1))
    with pytest.raises(PlanError, match="holds a comparison with other rows, another metric or another max_length"):
        compare_tiny(model, tmp_path, PLAIN, other_rows)
    other = tmp_path_factory.mktemp("other") / "weights"
    save_model(other)
    weights = other / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(PlanError, match=r"holds a comparison with another model, .*Give this task another name"):
        compare_tiny(str(other), tmp_path, PLAIN)
    assert (tmp_path / "tiny" / "experiment.json").read_bytes() == report
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    save_model(moved)
    assert methods_of(compare_tiny(str(moved), tmp_path, PLAIN)) == WHOLE, "the same weights in another place"


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "", ".rows", "a\\b", "\x1b[31mred", "a\nb", "a|b", "<b>", "x" * 101]
)
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The task is called .* expected up to 100 letters"):
        tiny_task(name)
    bench = Bench(model, tiny_task(), PLAIN, tmp_path)
    with pytest.raises(ConfigError, match="The plan is called"):
        design(bench, {name: make_plan()})


def test_a_plan_that_starves_late_blocks_is_named_in_the_report(model: str, tmp_path: Path) -> None:
    bench = Bench(model, tiny_task(), PLAIN, tmp_path)
    even, starving = uneven(bench), replace(uneven(bench), ranks=(9, 9, 1))
    _, facts = design(bench, {"even": even, "starving": starving})
    assert [note for note in facts["notes"] if "late" in note] == [f"starving: {late_note(starving)}"]


@pytest.mark.parametrize("name", ["sst2", "mean, twonn_mle", "without + 1", "plan (2)", "r=8", "Übung", "v1.2-a"])
def test_usual_names_are_taken(name: str) -> None:
    assert tiny_task(name).name == name


@pytest.mark.parametrize("name", ["full", "uniform", "eva", "grid", "uniform r = 8"])
def test_a_plan_that_is_called_as_an_arm_is_refused(name: str, model: str, tmp_path: Path, say: Say) -> None:
    asked = say(said(usual))
    bench = Bench(model, tiny_task(), PLAIN, tmp_path / "tiny")
    plans = {name: uneven(bench)}
    with pytest.raises(ConfigError, match=f"A plan is called '{name}', as an arm of the comparison is"):
        compare(
            model,
            tiny_task(),
            tmp_path,
            replace(PLAIN, allocations=("plan",), methods=("lora",)),
            plans=plans,
            progress=False,
        )
    assert not asked
