"""How rates are chosen and judged in a comparison. Trainings are only said: their losses are planted here."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins.findings.record import Run
from gelora_plugins.findings.results import Result
from gelora_plugins.findings.summary import Comparison
from tests.support.comparing import SETTINGS, compare_tiny, result, save_model

SEARCHED = replace(SETTINGS, allocations=("plan", "uniform"), methods=("lora",), rates=(1e-3, 3e-3, 1e-2), rate_seeds=3)
WITH_HEAD = replace(SEARCHED, head_rate=None)
CHANCE = 2.0  # the constant answer's loss, see tests/comparing.py
Make = Callable[..., tuple[Comparison, list[Run]]]


def far(rate: float, best: float) -> float:
    return 0.3 * math.log(rate / best) ** 2


def noise(made: Run) -> float:
    """The same for every run of a seed at a rate, some hundredths."""
    return 0.03 * math.sin(1000 * made.seed + 1e5 * made.rate)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(loss, settings, score)`: the comparison in tmp_path where runs end so, and those that it asked for."""

    def make(
        loss: Callable[[Run], float | None], settings: Any = SEARCHED, score: Callable[[Run], float] = lambda made: 0.5
    ) -> tuple[Comparison, list[Run]]:
        asked: list[Run] = []

        def attempt(bench: Any, made: Run, threads: int | None = None) -> Any:
            asked.append(made)
            found = loss(made)
            return result(made, None if found is None else score(made), found)

        monkeypatch.setattr("gelora_plugins.compare.run.attempt", attempt)
        return compare_tiny(model, tmp_path, settings), asked

    return make


def of(found: Comparison, method: str) -> Result:
    return next(r for r in found.results if r.method == method)


def test_each_method_has_the_rate_that_it_wants(make: Make) -> None:
    best = {"mine": 2e-3, "uniform": 2e-2}
    found, asked = make(lambda made: 0.8 + far(made.rate, best[made.method]) + noise(made))
    for name, rate in best.items():
        assert max(of(found, name).rate / rate, rate / of(found, name).rate) < 1.5
        assert not of(found, name).rate_at_edge
        assert of(found, name).choosing_runs == sum(made.choosing for made in asked if made.method == name)
    assert {made.seed for made in asked if made.choosing} == {1000, 1001, 1002}
    assert {made.seed for made in asked if not made.choosing} == {0, 1, 2}


def test_a_rate_that_few_seeds_tried_is_shown_beside_the_others(make: Make) -> None:
    """Each seed holds out other rows: alone, the first would make its rates look better than those that all tried."""
    found, _ = make(lambda made: 0.5 + far(made.rate, 3e-3) + 0.2 * (made.seed - 1000 if made.choosing else 0))
    tried = of(found, "mine").search
    assert {t.seeds for t in tried} == {1, 2, 3}
    assert [t.loss for t in tried if not t.diverged] == [
        pytest.approx(0.7 + far(t.rate, 3e-3)) for t in tried if not t.diverged
    ]


def test_what_judges_chooses_nothing(make: Make) -> None:
    """On the test rows another rate is best, by loss and by score."""
    found, _ = make(
        lambda made: 0.8 + far(made.rate, 3e-3 if made.choosing else 3e-2) + noise(made), score=lambda made: made.rate
    )
    assert all(2e-3 < r.rate < 4.5e-3 for r in found.results)


def test_the_seeds_that_judge_also_run_at_the_two_neighbours(make: Make) -> None:
    found, asked = make(lambda made: 0.8 + far(made.rate, 3e-3) + noise(made), score=lambda made: 100 * made.rate)
    ours = of(found, "mine")
    below, above = ours.around
    assert below.rate < ours.rate < above.rate <= 1.5 * ours.rate
    assert {made.rate for made in asked if not made.choosing} == {below.rate, ours.rate, above.rate}
    assert [a.scores for a in ours.around] == [pytest.approx((1e4 * a.rate,) * 3) for a in ours.around]
    text = found.to_markdown()
    assert f"| mine: mine | {ours.rate:g} | {below.rate:g}: {1e4 * (below.rate - ours.rate):+.2g}" in text
    assert f"| {ours.choosing_runs} |" in text


def test_without_all_neighbours_there_is_no_result_yet(make: Make, tmp_path: Path) -> None:
    """A difference that is known at the chosen rate alone would be too sure."""
    loss = lambda made: 0.8 + far(made.rate, 3e-3) + noise(made)  # noqa: E731
    found, _ = make(loss)
    path = tmp_path / "tiny" / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    left = Comparison.read(tmp_path)
    assert len(left.results) == 1
    assert "1 of 9 runs are not done. Run the same command again" in str(left.gaps[0])
    again, asked = make(loss)
    assert (again, len(asked)) == (found, 1)


def test_one_that_is_killed_while_it_judges_is_not_surer_than_one_that_is_whole(make: Make, tmp_path: Path) -> None:
    """The seeds run at the chosen rates first."""
    asked = []

    def killed(made: Run) -> float:
        asked.append(made)
        if sum(not made.choosing for made in asked) == 8:
            raise KeyboardInterrupt
        return 0.8 + far(made.rate, 3e-3) + noise(made)

    with pytest.raises(KeyboardInterrupt):
        make(killed)
    left = Comparison.read(tmp_path)
    assert not left.results
    assert [gap.unfinished for gap in left.gaps] == [True, True]


# The head


def head_and_adapter(made: Run) -> float:
    """The adapter wants 3e-3 and the head 3e-2, whatever the other has."""
    head = made.rate if made.head_rate is None else made.head_rate
    return 0.8 + far(made.rate, 3e-3) + 0.5 * far(head, 3e-2) + noise(made)


def test_the_head_has_one_rate_for_all_methods_and_it_is_chosen_on_uniform_lora(make: Make, tmp_path: Path) -> None:
    found, asked = make(head_and_adapter, WITH_HEAD)
    (head_rate,) = {made.head_rate for made in asked if not made.choosing}
    assert head_rate is not None
    assert 2e-2 < head_rate < 4.5e-2
    assert all(2e-3 < r.rate < 4.5e-3 and r.head_rate == head_rate for r in found.results)
    chose = [made for made in asked if made.choosing and made.head_rate != head_rate]
    assert {made.recipe.ranks for made in chose} == {(4, 4, 4)}
    assert any(
        line.startswith(f"tiny: The head's rate is {head_rate:g} for all methods: chosen beside uniform rank 4 at 0.00")
        for line in found.lines()
    )
    recorded = [json.loads(line) for line in (tmp_path / "tiny" / "runs.jsonl").read_text().splitlines()]
    assert {line["head_rate"] for line in recorded if not line["choosing"]} == {head_rate}
    again, asked = make(head_and_adapter, WITH_HEAD)
    assert not asked, "all is recorded"
    assert again == found


@pytest.mark.parametrize(("given", "used"), [(0.0, None), (0.07, 0.07)])
def test_a_head_rate_that_is_given_is_not_searched_for(given: float, used: float | None, make: Make) -> None:
    found, asked = make(head_and_adapter, replace(SEARCHED, head_rate=given))
    assert {made.head_rate for made in asked} == {used}
    assert "head" not in {made.row for made in asked}
    assert any("The head's rate is 0.07 for all methods." in line for line in found.lines()) is (used is not None)


def test_with_one_rate_nothing_is_searched_for(make: Make) -> None:
    _, asked = make(head_and_adapter, replace(WITH_HEAD, rates=(1e-3,)))
    assert {(made.rate, made.head_rate, made.choosing) for made in asked} == {(1e-3, None, False)}


def test_the_head_is_searched_for_beside_the_best_common_rate_and_then_the_adapter_beside_it(make: Make) -> None:
    """At one rate both are best between what each wants."""

    def loss(made: Run) -> float:
        head = made.rate if made.head_rate is None else made.head_rate
        return 0.8 + far(made.rate, 1e-3) + far(head, 1e-2) + noise(made)

    found, asked = make(loss, WITH_HEAD)
    beside = {made.rate for made in asked if made.row == "head" and made.head_rate is not None}
    assert len(beside) == 1
    assert 2e-3 < beside.pop() < 5e-3
    assert 7e-3 < of(found, "uniform").head_rate < 1.5e-2
    assert all(7e-4 < r.rate < 1.5e-3 for r in found.results)


# Cliffs


def test_where_judging_seeds_diverge_a_lower_rate_is_tried_and_no_verdict_is_given(make: Make) -> None:
    def loss(made: Run) -> float:
        gone = made.method == "mine" and not made.choosing and made.rate > 2.5e-3 and made.seed != 1
        return CHANCE if gone else 0.8 + far(made.rate, 3e-3) + noise(made)

    found, _ = make(loss, score=lambda made: 0.9 if made.method == "mine" else 0.5 + 0.01 * made.seed)
    ours = of(found, "mine")
    assert ours.rate < 2.5e-3
    assert ours.scores == (90.0,) * 3
    assert ours.diverged == f"2 of 3 seeds diverged at {of(found, 'uniform').rate:g}"
    contrast = found.contrast("tiny", "mine", "mine", "uniform")
    assert contrast.verdict == f"no verdict: mine: {ours.diverged}"
    assert str(contrast) == f"tiny, mine: mine against uniform: {contrast.verdict}."
    assert any(
        line.startswith(f"tiny, mine, mine: {ours.diverged}; its result is at {ours.rate:g}") for line in found.lines()
    )
    assert {a.diverged for a in ours.around if a.rate > 2.5e-3} == {"2 of 3"}


def test_a_loss_that_is_no_number_has_diverged_too(make: Make) -> None:
    found, _ = make(lambda made: None if made.rate > 2.5e-3 else 0.8 + far(made.rate, 3e-3) + noise(made))
    assert all(r.rate < 2.5e-3 and r.cliff is not None and r.cliff > 2.5e-3 for r in found.results)
    assert all(None not in a.scores for r in found.results for a in r.around)


def test_where_every_lower_rate_diverges_too_nothing_is_averaged(make: Make) -> None:
    found, _ = make(lambda made: CHANCE if not made.choosing and made.method == "mine" else 0.8 + far(made.rate, 3e-3))
    assert [r.method for r in found.results] == ["uniform"]
    assert "mine, mine: 3 of 3 seeds diverged at its best rate" in str(found.gaps[0])
    assert not found.contrasts


def test_a_method_that_learns_at_no_rate_is_a_gap_that_says_so(make: Make) -> None:
    found, _ = make(lambda made: CHANCE + 0.1 if made.method == "mine" else 0.8 + far(made.rate, 3e-3))
    assert [r.method for r in found.results] == ["uniform"]
    (gap,) = found.gaps
    assert not gap.unfinished
    assert str(gap).startswith("tiny: mine, mine: No rate from 1")
    assert str(gap).endswith("learned with every seed.")


def test_a_method_alone_at_its_rate_is_told_apart_only_if_it_is_so_at_all_that_could_have_been_chosen(
    make: Make,
) -> None:
    """The losses of the three seeds that choose disagree about the neighbour, whose scores are those of uniform."""

    def loss(made: Run) -> float:
        lean = {1000: 0.9, 1001: 1.0, 1002: 1.15}.get(made.seed, 1.0)
        return 0.8 + 0.05 * math.log(made.rate / (3e-3 * lean**4)) ** 2

    def score(made: Run) -> float:
        better = made.method == "mine" and abs(math.log(made.rate / 3e-3)) < 0.1
        return (0.6 if better else 0.5) + 0.001 * made.seed * (1 + (made.method == "mine"))

    found, _ = make(loss, score=score)
    ours, contrast = of(found, "mine"), found.contrast("tiny", "mine", "mine", "uniform")
    assert ours.rate == 3e-3
    assert any(a.as_good for a in ours.around)
    assert contrast.difference.mean == pytest.approx(10.1)
    assert contrast.verdict == "not told apart"
    assert contrast.difference.interval is not None
    assert contrast.difference.interval[0] < 1 < 10 < contrast.difference.interval[1]
    clear, _ = make(lambda made: 0.8 + 2 * far(made.rate, 3e-3) + 0 * noise(made), replace(SEARCHED, epochs=2), score)
    assert not any(a.as_good for a in of(clear, "mine").around)
    assert clear.contrast("tiny", "mine", "mine", "uniform").verdict == "better"
