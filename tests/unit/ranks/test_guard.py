"""Plans that leave late blocks with little are told, others are not."""

from dataclasses import replace

import pytest

from gelora_plugins.ranks.guard import late_note, starved
from gelora_plugins.report.rank_report import RankReport
from tests.support.plans import make_plan, make_profile, make_sites


@pytest.mark.parametrize(
    ("ranks", "means"),
    [
        ([8] * 6, None),
        ([1] * 6, None),
        ([3, 2, 1, 2, 2, 1], None),
        ([15, 15, 15, 1, 1, 1], (1.0, 8.0)),
        ([1, 1, 1, 15, 15, 15], None),
        ([4, 4, 4, 4, 1, 2], (1.5, 19 / 6)),
        ([2, 2, 2, 2, 1, 1], None),  # 1 is more than half of 10 / 6
        ([9, 1, 1], (1.0, 11 / 3)),
        ([9, 1], (1.0, 5.0)),
        ([9], None),
        ([], None),
    ],
)
def test_the_late_third_has_less_than_half_of_the_mean(ranks, means):
    assert starved(ranks) == (None if means is None else pytest.approx(means))


def test_exactly_half_of_the_mean_is_enough():
    assert starved([3, 3, 2, 2, 1, 1]) is None  # 1 of 2


def test_the_report_says_it_and_what_to_do():
    plan = make_plan(ranks=(15, 15, 15, 1, 1, 1))
    assert late_note(plan) in RankReport(plan).lines()
    assert "The last third of 6 blocks has a mean rank of 1.0, where all have 8.0." in late_note(plan)
    assert late_note(make_plan()) == ""


def test_each_stack_of_a_model_has_late_blocks():
    """An encoder that is starved at its end is not hidden by a decoder that is not."""
    profile = make_profile((5.0, 6.0, 7.0, 8.0), (5.0, 6.0, 7.0, 8.0))
    plan = replace(make_plan(), profile=profile, sites=make_sites(profile), ranks=(9, 9, 1, 9, 9, 9))
    assert "of 3 blocks has a mean rank of 1.0, where all have 6.3" in late_note(plan)
