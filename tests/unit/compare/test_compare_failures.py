"""What fails, or has no score, hides nothing else of a comparison."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins.errors import PlanError
from gelora_plugins.findings.arms import Recipe
from gelora_plugins.findings.record import Record, Run
from gelora_plugins.findings.summary import Comparison
from tests.support.comparing import (
    CHOSEN,
    PLAIN,
    WHOLE,
    Say,
    compare_tiny,
    failing,
    methods_of,
    result,
    said,
    tiny_task,
    usual,
)


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
