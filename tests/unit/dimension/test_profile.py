"""What a profile says of its own precision: standard errors of growth, redraws, notes."""

import statistics
from dataclasses import replace

import pytest

from tests.support.plans import SST2, make_profile


def with_replicates(profile, replicates):
    estimates = tuple(replace(e, replicates=tuple(r)) for e, r in zip(profile.estimates, replicates, strict=True))
    return replace(profile, estimates=estimates)


# --- growth_std_errors


def test_the_standard_error_of_growth_is_that_of_the_differences():
    profile = with_replicates(make_profile([10.0, 12.0, 11.0]), [(9, 10, 11), (11, 12, 13), (11, 10, 9)])
    # What both boundaries share cancels; what they do against each other adds up.
    assert profile.growth_std_errors() == (0.0, 2.0)


def test_independent_replicates_add_their_variances():
    profile = make_profile([10.0, 12.0], replicates=4000, spread=0.5)
    assert profile.growth_std_errors()[0] == pytest.approx(0.5 * 2**0.5, rel=0.05)


def test_no_standard_error_where_a_boundary_has_no_replicates():
    profile = with_replicates(make_profile([10.0, 12.0, 11.0, 12.0]), [(9, 10), (), (11, 10), (11, 12)])
    assert profile.growth_std_errors() == (None, None, pytest.approx(2**0.5))
    assert make_profile(SST2).growth_std_errors() == (None,) * 6


def test_no_standard_error_where_there_is_no_growth():
    profile = make_profile([None, 10.0, 11.0], [None, 12.0, 13.0], replicates=5)
    assert [error is None for error in profile.growth_std_errors()] == [True, False, True, False]
    assert [error is None for error in profile.growth_std_errors()] == [g is None for g in profile.growth()]


# --- redraws


def test_redraws_spread_around_the_measured_growth_by_its_standard_error():
    profile = make_profile(SST2, replicates=30, spread=0.3)
    growths = [redraw.growth() for redraw in profile.redraws()]
    assert len(growths) == 30
    columns = zip(zip(*growths, strict=True), profile.growth(), profile.growth_std_errors(), strict=True)
    for redrawn, growth, std_error in columns:
        assert statistics.fmean(redrawn) == pytest.approx(growth)
        assert statistics.stdev(redrawn) == pytest.approx(std_error)


def test_replicates_that_are_all_too_small_move_nothing():
    profile = with_replicates(make_profile([10.0, 12.0]), [(8.0, 8.2, 8.4), (9.0, 9.2, 9.4)])
    values = [[estimate.value for estimate in redraw.estimates] for redraw in profile.redraws()]
    assert values == [pytest.approx(v) for v in ([9.8, 11.8], [10.0, 12.0], [10.2, 12.2])]


def test_a_redraw_is_the_same_profile_but_for_the_values():
    profile = make_profile([None, 10.0, 11.0], replicates=3)
    for redraw in profile.redraws():
        assert redraw != profile
        values = zip(redraw.estimates, profile.estimates, strict=True)
        same = tuple(replace(moved, value=measured.value) for moved, measured in values)
        assert replace(redraw, estimates=same) == profile


def test_a_redraw_is_never_below_zero():
    profile = with_replicates(make_profile([1.0, 1.0]), [(0.1, 5.0), (0.1, 5.0)])
    assert [redraw.estimates[0].value for redraw in profile.redraws()] == [0.001, pytest.approx(3.45)]


def test_a_boundary_without_replicates_stays_and_a_profile_without_any_has_no_redraws():
    profile = with_replicates(make_profile([10.0, 12.0, 11.0]), [(9, 11), (), (10, 12)])
    assert [redraw.estimates[1].value for redraw in profile.redraws()] == [12.0, 12.0]
    assert list(make_profile(SST2).redraws()) == []


# --- notes


def test_the_notes_say_whether_the_target_was_reached():
    profile = make_profile(SST2, replicates=50, spread=0.3)
    largest = max(profile.growth_std_errors())
    reached = replace(profile, target_std_error=1.5).notes()[-1]
    assert reached == f"The growth of every block is known to a standard error of {largest:.2f} (1.5 was asked)."
    missed = replace(profile, target_std_error=0.1).notes()[-1]
    assert missed.startswith("The target_std_error of 0.1 was not reached: the largest standard error of a growth is ")
    assert f"{largest:.2f} with all 1,000 documents" in missed
    assert "target" not in " ".join(profile.notes())


def test_the_notes_say_that_a_target_means_nothing_without_standard_errors():
    note = replace(make_profile(SST2), target_std_error=0.1).notes()[-1]
    assert note == "The estimator twonn_mle gives no standard errors, so target_std_error had no effect."


def test_the_same_warning_of_several_boundaries_is_one_note():
    profile = make_profile(SST2)
    warnings = ["", "One coordinate is large.", "One coordinate is large.", "Few points.", "", "", ""]
    estimates = tuple(replace(e, warning=w) for e, w in zip(profile.estimates, warnings, strict=True))
    assert replace(profile, estimates=estimates).notes()[-2:] == (
        "Boundaries 1, 2: One coordinate is large.",
        "Boundary 3: Few points.",
    )
