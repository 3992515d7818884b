"""The verdict: whether the data tell the blocks apart. Profiles are planted; nothing is measured."""

import random
from dataclasses import replace

import pytest

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.verdict import LEVEL, sure_plan, tell_apart, verdict
from gelora_plugins.report.rank_report import RankReport
from tests.support.plans import make_plan, make_profile


def drawn(dimensions, seed, std_error=0.5, count=100):
    """A profile as a draw of documents would give it: normal errors, replicates that have the same spread."""
    rng = random.Random(seed)
    profile = make_profile([d + std_error * rng.gauss(0, 1) for d in dimensions])

    def moved(value):
        return tuple(value + std_error * rng.gauss(0, 1) for _ in range(count))

    estimates = (replace(e, std_error=std_error, replicates=moved(e.value)) for e in profile.estimates)
    return replace(profile, estimates=tuple(estimates))


def planned(profile, ranks=(3, 2, 1, 2, 2, 1), **options):
    return replace(make_plan(ranks=ranks, **options), profile=profile)


ALIKE = {
    "no growth": [30.0] * 7,
    "one dimension a block": [30.0 + i for i in range(7)],
    "falling, each block otherwise": [30.0, 29.0, 27.5, 25.0, 24.9, 22.0, 20.0],
}


@pytest.mark.parametrize("dimensions", ALIKE.values(), ids=ALIKE)
def test_blocks_that_need_the_same_are_seldom_said_to_differ(dimensions):
    # With a rate of 5 %, 20 or more of 200 are seen once in 300 sets of seeds. These seeds are fixed.
    assert sum(tell_apart(drawn(dimensions, seed)).differ for seed in range(200)) < 20


def test_a_block_that_grows_by_six_standard_errors_is_seen():
    grown = [30.0, 30.0, 34.5, 34.5, 34.5, 34.5, 34.5]  # the error of a growth is 0.7
    assert sum(tell_apart(drawn(grown, seed)).differ for seed in range(50)) >= 45


def test_a_shift_that_all_boundaries_share_is_no_difference():
    profile = drawn([30.0] * 7, 0, std_error=1e-3)
    rng = random.Random(1)
    shifts = [5 * rng.gauss(0, 1) for _ in range(100)]
    shared = tuple(
        replace(e, replicates=tuple(30 + x + shift for x, shift in zip(e.replicates, shifts, strict=True)))
        for e in profile.estimates
    )
    assert tell_apart(replace(profile, estimates=shared)).p == pytest.approx(tell_apart(profile).p)


def test_by_hand():
    # Growths 1.9 and 0 of one standard error, 1.155: they can share a need at t = 1.9 / 2.31 = 0.82.
    values = ((10.1, (9.0, 11.0, 9.0, 11.0)), (12.0, (12.0,) * 4), (12.0, (11.0, 13.0, 13.0, 11.0)))
    profile = make_profile([10.1, 12.0, 12.0])
    estimates = tuple(
        replace(e, value=value, replicates=moved) for e, (value, moved) in zip(profile.estimates, values, strict=True)
    )
    found = tell_apart(replace(profile, estimates=estimates))
    assert found.p == pytest.approx(3 / 5)  # two of four replicates move the growths apart, by 2 / 2.31
    assert not found.differ


def test_what_the_report_opens_with():
    apart = planned(drawn([20.0, 26.0, 26.0, 26.0, 26.0, 26.0, 26.0], 0, 0.1), rank_changes=(0.0, 0.05, 0.06, 1, 1, 1))
    assert verdict(apart) == "Blocks differ: 2 of 6 ranks are settled by your data."
    unsure = planned(drawn([30.0] * 7, 0))
    assert tell_apart(unsure.profile).p > LEVEL
    assert verdict(unsure).startswith("Your data do not tell the blocks apart (1,000 documents")
    assert verdict(unsure).endswith("these ranks are one draw of many.")
    assert verdict(make_plan(ranks=(1,) * 6)) == "Every block has the same rank: this is LoRA with r = 1."
    assert verdict(make_plan()).startswith("How sure these ranks are is not known: the estimator ")


SITES = make_plan().sites
UNSURE = drawn([30.0, 31.0, 31.0, 31.0, 31.0, 31.0, 31.0], 0)


def chosen(profile, **options):
    return sure_plan(profile, GeLoRAConfig(**options), SITES, 8, lora_alpha=16.0)


def test_ranks_that_are_not_sure_are_used_replaced_or_refused(caplog):
    assert not tell_apart(UNSURE).differ
    assert len(set(chosen(UNSURE).ranks)) > 1
    assert not caplog.records
    assert chosen(UNSURE, on_unsure="uniform").ranks == (8,) * 6
    assert "Every block gets your own r instead, because on_unsure is 'uniform'" in caplog.text
    with pytest.raises(PlanError, match=r"do not tell the blocks apart .* on_unsure is 'raise': give more documents"):
        chosen(UNSURE, on_unsure="raise")


@pytest.mark.parametrize("on_unsure", ["uniform", "raise"])
def test_ranks_that_are_sure_or_alike_stay(on_unsure):
    sure = drawn([20.0, 26.0, 26.0, 26.0, 26.0, 26.0, 26.0], 0, 0.1)
    assert chosen(sure, on_unsure=on_unsure).ranks == chosen(sure).ranks
    alike = make_profile([20.0] * 7)
    assert chosen(alike, on_unsure=on_unsure).ranks == (1,) * 6


def test_without_errors_nothing_is_sure():
    with pytest.raises(PlanError, match="How sure these ranks are is not known"):
        chosen(make_profile([20.0, 26.0, 26.0, 26.0, 26.0, 26.0, 26.0]), on_unsure="raise")


def test_how_many_documents_would_do_is_said_where_that_is_a_number_worth_saying():
    found = [tell_apart(drawn([30.0, 31.5, 31.5, 31.5, 31.5, 31.5, 31.5], seed)) for seed in range(40)]
    said = [one.documents for one in found if not one.differ]
    assert all(one.documents is None for one in found if one.differ)
    assert said
    assert all(count is None or 1000 <= count <= 20_000 for count in said)


def test_the_verdict_comes_first_everywhere():
    plan = make_plan(ranks=(1,) * 6)
    report = RankReport(plan)
    assert str(report).strip().splitlines()[0] == verdict(plan)
    assert report.to_markdown().splitlines()[2] == verdict(plan)
    assert report.to_dict()["verdict"] == verdict(plan)
