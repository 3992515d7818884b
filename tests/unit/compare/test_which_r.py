"""What benchmarks/compare/which_r.py says of a task that was made anew beside its record."""

import copy
from typing import Any

import pytest

from benchmarks.compare.which_r_shown import check, lines_of

LAYOUT = {"gain_interval": [-0.01, 0.02]}


def found(**losses: list[float | None]) -> dict[str, Any]:
    """A task with these losses less that of r = 8, by arm: mean and both ends of an interval."""
    arm = {"parameters": 10, "loss": [0.8, 0.02], "score": [75.0, 1.0], "rate": 0.004, "edge": False}
    arms = [
        {**arm, "arm": name, "loss_less_that_of_8": loss, "loss_less_the_best": loss, "score_less_that_of_8": loss}
        for name, loss in losses.items()
    ]
    room = {"said": "Nothing can be won.", "layout": LAYOUT}
    rule = {"rule": "8", "rank": 8, "judged_as": "r = 8"}
    return {"arms": arms, "not_run": ["late"], "rules": [rule], "headroom": {"loss": room, "score": room}}


RECORDED = found(**{"r = 8": [0.0, None, None], "r = 1": [0.11, 0.05, 0.17], "r = 32": [0.01, -0.02, 0.04]})


def test_what_was_made_again_alike_is_not_wrong() -> None:
    made = found(**{"r = 8": [0.0, None, None], "r = 1": [0.03, -0.02, 0.08], "r = 32": [-0.01, -0.03, 0.01]})
    said, wrong = check(made, RECORDED)
    assert not wrong
    assert said == [
        "Headroom is within the recorded one.",
        "2 differences from r = 8 are recorded, 1 of them told apart from 0. 1 have their sign; the rank correlation "
        "of all with the recorded ones is 1.00.",
    ]
    without = {**RECORDED, "headroom": {}}
    assert check(made, without)[0][0] == "Headroom is not compared: it is not recorded, or not made."


@pytest.mark.parametrize(
    ("arm", "loss"), [("r = 1", [-0.01, -0.1, 0.08]), ("r = 1", [0.5, 0.4, 0.6]), ("r = 32", [0.2, 0.19, 0.21])]
)
def test_another_side_or_another_size_is_wrong(arm: str, loss: list[float]) -> None:
    made = copy.deepcopy(RECORDED)
    next(a for a in made["arms"] if a["arm"] == arm)["loss_less_that_of_8"] = loss
    _, wrong = check(made, RECORDED)
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{arm}: {loss[0]:+.3f}")


def test_more_headroom_than_the_record_allows_is_wrong() -> None:
    made = copy.deepcopy(RECORDED)
    made["headroom"]["loss"] = {"said": "Something can be won.", "layout": {"gain_interval": [0.03, 0.1]}}
    assert check(made, RECORDED)[1] == ["Something can be won.\n  recorded: Nothing can be won."]


def test_tables_name_what_was_not_run() -> None:
    lines = list(lines_of(RECORDED))
    assert "| r = 8 | 10 | 0.800 ± 0.020 | 0 | 75.0 ± 1.0 | 0 | 0.004 |" in lines
    assert "Not run: late. So the best of the grid is that of the ranks above." in lines
    assert "| 8 | 8 | 0 | 0 | 10 |" in lines
