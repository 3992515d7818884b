"""What a comparison records, goes on with, and never loses. Trainings are only said: their scores are chosen here."""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins import cli
from gelora_plugins.compare.allocations import lora
from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.run import compare, design
from gelora_plugins.compare.task import Task
from gelora_plugins.errors import ConfigError, PlanError, ProbeError, WriteError
from gelora_plugins.findings.arms import Recipe
from gelora_plugins.findings.record import Record, Run, locked, read_lines
from gelora_plugins.findings.summary import Comparison
from gelora_plugins.ranks.guard import late_note
from tests.support.comparing import (
    SETTINGS,
    UNEVEN,
    compare_tiny,
    result,
    rows,
    said,
    save_model,
    tiny_task,
    uneven,
    valley,
)
from tests.support.plans import make_plan

CHOSEN = replace(SETTINGS, allocations=("plan", "uniform", "permuted", "grid"), methods=("lora",))
PLAIN = replace(CHOSEN, rates=(1e-3,))
SCORES = {"mine": 0.8, "uniform": 0.7, "permuted": 0.6, "full": 0.9}
LINES = 3 * 3  # mine, uniform (of the grid too), permuted: one for each seed
Say = Callable[[Any], list[Run]]


def usual(made: Run) -> float:
    return SCORES[made.method] + 0.01 * made.seed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say(attempt)` puts it in the place of trainings, and gives the list of those that it is asked for."""

    def say(attempt: Any) -> list[Run]:
        asked: list[Run] = []

        def watched(bench: Bench, made: Run, threads: int | None = None) -> Any:
            asked.append(made)
            return attempt(bench, made)

        monkeypatch.setattr("gelora_plugins.compare.run.attempt", watched)
        return asked

    return say


def methods_of(found: Comparison) -> list[tuple[str, str]]:
    return [(r.row, r.method) for r in found.results]


WHOLE = [("mine", "mine"), ("mine", "uniform"), ("mine", "permuted"), ("uniform r = 4", "uniform")]


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


# What fails


def failing(made: Run, when: bool) -> Any:
    return "OutOfMemoryError: no memory." if when else result(made, usual(made))


def test_a_run_that_fails_ends_no_other_and_is_tried_again_by_the_next_call(
    model: str, tmp_path: Path, say: Say
) -> None:
    asked = say(lambda bench, made: failing(made, made.method == "mine" and made.seed == 1))
    found = compare_tiny(model, tmp_path, PLAIN)
    assert methods_of(found) == WHOLE[1:]
    (gap,) = found.gaps
    assert gap.unfinished
    assert "tiny: mine, mine: seed 1 at the rate 0.001 failed: OutOfMemoryError: no memory. Run the same comm" in str(
        gap
    )
    assert str(gap).endswith("The other scores: 80.")
    assert [made.seed for made in asked if made.method == "mine" and not made.choosing] == [0, 1], "not with seed 2"
    asked = say(said(usual))
    found = compare_tiny(model, tmp_path, PLAIN)
    assert [made.seed for made in asked] == [1, 2]
    assert (methods_of(found), found.gaps) == (WHOLE, ())


def test_a_method_whose_rate_could_not_be_chosen_is_not_trained(model: str, tmp_path: Path, say: Say) -> None:
    asked = say(lambda bench, made: failing(made, made.method == "mine" and made.rate == 1e-2))
    found = compare_tiny(model, tmp_path, CHOSEN)
    assert not [made for made in asked if made.method == "mine" and not made.choosing]
    assert methods_of(found) == WHOLE[1:]
    assert "mine, mine: seed 1000 at the rate 0.01 failed" in str(found.gaps[0])


def test_where_everything_fails_each_method_says_why(model: str, tmp_path: Path, say: Say) -> None:
    asked = say(lambda bench, made: "RuntimeError: broken.")
    found = compare_tiny(model, tmp_path, CHOSEN)
    assert len(asked) == 3, "once for each recipe"
    assert not found.results
    assert [gap.unfinished for gap in found.gaps] == [True] * 4
    assert all(path.is_file() for path in found.write(tmp_path / "out"))


class Beside:
    """Workers of two jobs; `fails` says which runs fail, and whether beside another run."""

    jobs = 2

    def __init__(self, fails: Callable[[Run, int], bool]) -> None:
        self.fails = fails
        self.tried: list[tuple[int, int]] = []

    def train(self, runs: Iterable[Run], jobs: int) -> Iterator[tuple[Run, Any]]:
        for made in runs:
            self.tried.append((made.recipe.budget, jobs))
            yield made, "RuntimeError: x." if self.fails(made, jobs) else result(made, 0.5)


class NoBar:
    disable = True

    def update(self) -> None: ...


def test_what_fails_beside_others_is_tried_once_more_alone(tmp_path: Path) -> None:
    runs = [Run("r", "m", Recipe("eva", 1, budget=budget), 0, 1.0, choosing=False) for budget in range(4)]
    workers = Beside(lambda made, jobs: made.recipe.budget == 3 or (made.recipe.budget == 1 and jobs == 2))
    record = Record(tmp_path / "runs.jsonl", {})
    record.make(runs, workers, NoBar())
    assert workers.tried == [(0, 2), (1, 2), (2, 2), (3, 2), (1, 1), (3, 1)]
    assert [recipe.budget for recipe in record.failures] == [3]
    assert len(record.lines) == 3


# What has no score


def test_one_diverged_seed_hides_only_its_method(model: str, tmp_path: Path, say: Say) -> None:
    def score(made: Run) -> float | None:
        return None if made.method == "permuted" and made.seed == 2 else usual(made)

    say(said(score))
    found = compare_tiny(model, tmp_path, PLAIN)
    assert methods_of(found) == [name for name in WHOLE if name[1] != "permuted"]
    (gap,) = found.gaps
    assert not gap.unfinished
    assert "mine, permuted: 1 of 3 seeds diverged at its best rate, 0.001. Give lower rates. The other" in str(gap)
    assert [(c.ours, c.theirs) for c in found.contrasts] == [("mine", "uniform")]
    assert found.lines()[0] == str(gap)
    assert f"- {gap}\n" in found.to_markdown()
    assert all(path.is_file() for path in found.write(tmp_path / "out"))


def test_a_score_without_a_finite_loss_is_none(model: str, tmp_path: Path, say: Say) -> None:
    """As older records have it: of weights that are all NaN, argmax makes an answer."""
    say(lambda bench, made: result(made, usual(made), loss=None if made.method == "mine" else 0.5))
    assert "3 of 3 seeds diverged" in str(compare_tiny(model, tmp_path, PLAIN).gaps[0])


@pytest.mark.parametrize("left", ["half", "nothing", "no file"])
def test_an_unfinished_neighbour_hides_nothing(left: str, model: str, tmp_path: Path, say: Say) -> None:
    say(said(usual))
    compare_tiny(model, tmp_path, PLAIN, tiny_task("other"))
    path = tmp_path / "other" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("" if left == "nothing" else "".join(lines[:-1]) + lines[-1][:9])
    if left == "no file":
        path.unlink()
    found = compare_tiny(model, tmp_path, PLAIN)
    assert [(r.row, r.method) for r in found.results if r.task == "tiny"] == WHOLE
    assert {gap.task for gap in found.gaps} == {"other"}
    missing = "1 of 3" if left == "half" else "3 of 3"
    assert f"{missing} runs are not done. Run the same command again; it goes on there." in str(found.gaps[-1])


@pytest.mark.parametrize("damage", ["{", "[]", '{"kind": "rank_plan"}', '{"kind": "comparison"}'])
def test_a_damaged_neighbour_hides_nothing(damage: str, model: str, tmp_path: Path, say: Say) -> None:
    say(said(usual))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "experiment.json").write_text(damage)
    found = compare_tiny(model, tmp_path, PLAIN)
    assert methods_of(found) == WHOLE
    assert [gap.task for gap in found.gaps] == ["other"]
    assert "experiment.json" in found.lines()[0]
    (tmp_path / "tiny" / "experiment.json").unlink()
    with pytest.raises(PlanError, match=r"holds no comparison; .*experiment.json"):
        Comparison.read(tmp_path)


def test_two_folders_of_one_task_are_not_mixed(model: str, tmp_path: Path, say: Say) -> None:
    say(said(usual))
    compare_tiny(model, tmp_path, PLAIN)
    (tmp_path / "a copy").mkdir()
    for name in ("experiment.json", "runs.jsonl"):
        (tmp_path / "a copy" / name).write_bytes((tmp_path / "tiny" / name).read_bytes())
    found = Comparison.read(tmp_path)
    assert methods_of(found) == WHOLE
    assert [str(gap) for gap in found.gaps] == ["tiny: its task is called tiny, as another here is."]


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


# The command line


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gelora", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / ".rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60, 0)))
    return tmp_path


def save_plan(bench: Bench, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    uneven(bench).save(path)
    return path


def arguments_of(model: str, files: Path) -> tuple[object, ...]:
    options = f"--task classification --methods lora --seeds 3 --rank 4 --alpha 8 -o {files / 'out'}"
    options += " --allocations plan,uniform"
    return (model, files / ".rows.jsonl", *options.split(), "--target-modules", SETTINGS.target_modules)


def test_two_plans_of_one_name_are_refused(
    model: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(model, tiny_task(), SETTINGS, files)
    first, second = (save_plan(bench, files / folder / "plan.json") for folder in ("a", "b"))
    assert run_command(monkeypatch, *arguments_of(model, files), "--plan", first, "--plan", second) == 2
    error = capsys.readouterr().err
    assert "Two plans are called 'plan'" in error
    assert str(first) in error
    assert str(second) in error


def test_a_hidden_file_has_a_name_and_what_failed_is_an_exit_code(
    model: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], say: Say
) -> None:
    plan = save_plan(Bench(model, tiny_task(), SETTINGS, files), files / "a" / "plan.json")
    command = (*arguments_of(model, files), "--plan", plan)
    say(
        lambda bench, made: (
            failing(made, made.method == "plan") if made.method == "plan" else result(made, 0.5, valley(made))
        )
    )
    assert run_command(monkeypatch, *command) == 1
    shown = capsys.readouterr().out
    assert "rows: plan, plan: seed 1000 at the rate 0.0003, the head's" in shown
    assert "plan: uniform |" in shown
    say(said(lambda made: 0.5))
    assert run_command(monkeypatch, *command) == 0
    assert (files / "out" / "rows" / "runs.jsonl").is_file()


def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_trained(
    model: str, files: Path, monkeypatch: pytest.MonkeyPatch, say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = say(said(usual))
    assert run_command(monkeypatch, *arguments_of(model, files), "--name", "../../x") == 2
    assert "The task is called '../../x'" in capsys.readouterr().err
    assert not asked
    assert not (files / "out").exists()


def test_the_heads_rate_is_an_option(model: str, files: Path, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    plan = save_plan(Bench(model, tiny_task(), SETTINGS, files), files / "a" / "plan.json")
    asked = say(said(lambda made: 0.5))
    options = ("--plan", plan, "--head-rate", "0.02", "--rates", "1e-3")
    assert run_command(monkeypatch, *arguments_of(model, files), *options) == 0
    assert {made.head_rate for made in asked} == {0.02}
