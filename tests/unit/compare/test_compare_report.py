"""What a comparison says. The runs are made up, so that every score and verdict is chosen here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins.compare.bench import Settings
from gelora_plugins.findings.record import Run
from gelora_plugins.findings.stats import holm
from gelora_plugins.findings.summary import CAVEAT, CAVEAT_DRAWN, Comparison
from tests.support.comparing import SETTINGS, compare_tiny, said, save_model, tiny_task, valley

PLAIN = replace(SETTINGS, allocations=("plan", "uniform", "permuted", "grid"), methods=("lora",), grid=(2, 8))
MEANS = {"mine": 0.80, "uniform": 0.70, "permuted": 0.79}
APART = {"mine": (0.0, 0.01, 0.02), "uniform": (0.0, 0.01, 0.02), "permuted": (-0.05, 0.06, -0.01)}


def usual(made: Run) -> float:
    """Ours is 10 better than uniform at each seed, give or take 0.1, and no better than permuted."""
    return (
        MEANS[made.method]
        + APART[made.method][made.seed % 1000]
        + (0.001 * made.seed if made.method == "mine" else 0.0)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def made(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`made(score, settings, loss, task)`: the comparison of those scores and losses, in tmp_path."""

    def make(score: Any = usual, settings: Settings = PLAIN, loss: Any = valley, **task: Any) -> Comparison:
        monkeypatch.setattr("gelora_plugins.compare.run.attempt", said(score, loss))
        return compare_tiny(model, tmp_path, settings, tiny_task(**task))

    return make


def test_the_report_is_written_and_read_again(made: Any, tmp_path: Path) -> None:
    found = made()
    paths = found.write(tmp_path / "out")
    assert [path.name for path in paths] == [
        "comparison.json",
        "comparison.md",
        "comparison.html",
        "pareto.png",
        "patterns.png",
        "rates.png",
    ]
    assert all(path.stat().st_size > 0 for path in paths)
    summary = json.loads(paths[0].read_text(encoding="utf-8"))
    assert summary["results"][0]["scores"] == list(found.results[0].scores)
    text = paths[1].read_text(encoding="utf-8")
    assert "| mine: permuted | 1,536 |" in text
    assert "40 training rows, 20 test rows, 3 seeds" in text
    assert text.endswith(f"- {CAVEAT}\n")


def test_what_is_told_apart_and_what_is_not(made: Any) -> None:
    found = made()
    assert found.contrast("tiny", "mine", "mine", "uniform").verdict == "better"
    assert found.contrast("tiny", "mine", "mine", "permuted").verdict == "not told apart"
    lines = found.lines()
    assert any(line.startswith("tiny, mine: mine is better than uniform (difference +10") for line in lines)
    assert any(
        line.startswith("tiny, mine: mine is not told apart from permuted (difference +2.1, 95") for line in lines
    )
    assert not any("equal" in line for line in lines)


def test_p_is_corrected_for_all_differences_of_all_tasks(made: Any) -> None:
    made(name="first")
    found = made(name="second").contrasts
    assert {(c.task, c.ours, c.theirs) for c in found} == {
        (task, *pair)
        for task in ("first", "second")
        for pair in (("mine", "uniform"), ("mine", "permuted"), ("permuted", "uniform"))
    }
    assert [c.corrected_p for c in found] == holm([c.difference.p for c in found])
    assert min(c.corrected_p for c in found) == 6 * min(c.difference.p for c in found)


def test_equal_is_what_differs_by_less_than_the_margin(made: Any) -> None:
    found = made(settings=replace(PLAIN, margin=50.0))
    assert [c.verdict.split()[0] for c in found.contrasts] == ["equal"] * 3
    assert any(line.startswith("tiny, mine: mine is equal to uniform within 10.3 (") for line in found.lines())


def test_the_same_scores_are_equal_without_a_margin(made: Any) -> None:
    found = made(lambda run: 0.5 + 0.01 * run.seed)
    assert {c.verdict for c in found.contrasts} == {"equal within 0"}
    assert "tiny, mine: mine is equal to uniform within 0: the scores are the same." in found.lines()


def test_the_report_says_whose_rows_they_are(made: Any) -> None:
    text = made(settings=replace(PLAIN, rows_per_seed=30)).to_markdown()
    assert "for each seed 30 of 40 training rows, 20 test rows" in text
    assert text.endswith(f"- {CAVEAT_DRAWN}\n")


def test_several_tasks_are_counted_in_one_line(made: Any) -> None:
    assert not [line for line in made(name="first").lines() if "over" in line]
    lines = made(lambda run: usual(replace(run, method="uniform")), name="second").lines()
    assert (
        lines[0] == "mine: mine against uniform over 2 tasks: better on 1, worse on 0, equal on 1, not told apart on 0."
    )
    assert lines[1].endswith("over 2 tasks: better on 0, worse on 0, equal on 1, not told apart on 1.")


# Shares of the chosen uniform rank


def of_ranks(tested: dict[int, float]) -> dict[str, Any]:
    """Scores of the test rows by the first rank; rank 2 has the lowest loss while rates are chosen."""
    return {
        "score": lambda run: tested.get(run.recipe.ranks[0], 0.5),
        "loss": lambda run: valley(run) + (0.1 if run.choosing and run.recipe.ranks[0] != 2 else 0.0),
    }


def test_the_uniform_rank_that_shares_are_of_is_chosen_on_held_out_training_rows(made: Any) -> None:
    found = made(**of_ranks({2: 0.5, 8: 0.9, 7: 0.45}))  # the test rows prefer 8
    shares = {(r.row, r.method): r.share_of_best for r in found.results}
    assert shares["uniform r = 2", "uniform"] == 1.0
    assert shares["uniform r = 8", "uniform"] == pytest.approx(1.8)
    assert shares["mine", "mine"] == pytest.approx(0.9)
    assert next(r for r in found.results if r.row == "mine").share_of_parameters == 2.0


def test_a_share_of_a_loss_is_below_one_where_it_is_worse(made: Any) -> None:
    found = made(**of_ranks({2: 1.0, 8: 0.5, 7: 2.0}), metric="loss")
    shares = {(r.row, r.method): r.share_of_best for r in found.results}
    assert shares["uniform r = 2", "uniform"] == 1.0
    assert shares["mine", "mine"] == pytest.approx(0.5)
    assert shares["uniform r = 8", "uniform"] == pytest.approx(2.0)


def test_without_rates_to_choose_from_no_test_row_chooses_a_rank_either(made: Any) -> None:
    found = made(settings=replace(PLAIN, rates=(1e-3,)))
    assert {r.share_of_best for r in found.results} == {None}


def test_a_score_of_zero_has_no_share(made: Any) -> None:
    found = made(**of_ranks({2: 0.0}))
    assert {r.share_of_best for r in found.results} == {None}


# Records of before


def test_a_record_without_device_and_our_version_is_read(made: Any, tmp_path: Path) -> None:
    """Its runs are found by the keys that it holds, whatever a run's identity is made of now."""
    found = made(settings=replace(PLAIN, rates=(1e-3,)))
    path = tmp_path / "tiny" / "experiment.json"
    experiment = json.loads(path.read_text(encoding="utf-8"))
    del experiment["identity"]["device"], experiment["identity"]["versions"]["gelora"], experiment["head"]
    for row in experiment["rows"]:
        for method in row["methods"]:
            del method["failure"], method["others"]
    path.write_text(json.dumps(experiment), encoding="utf-8")
    again = Comparison.read(tmp_path)
    assert [r.scores for r in again.results] == [r.scores for r in found.results]
    assert again.contrasts == found.contrasts
    assert not again.gaps


RECORDED = sorted((Path(__file__).parents[3] / "benchmarks" / "results").glob("compare*/comparison.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_what_was_recorded_is_read_as_it_was(path: Path) -> None:
    recorded = json.loads(path.read_text(encoding="utf-8"))
    again = json.loads(json.dumps(Comparison.read(path.parent).to_dict()))
    for part in ("results", "contrasts"):
        assert [{name: a[name] for name in b} for a, b in zip(again[part], recorded[part], strict=True)] == recorded[
            part
        ]
    assert again["lines"] == recorded["lines"]
