"""How the plan depends on the setting: every setting gives what a probe of its own would, for one forward pass."""

import json
from dataclasses import replace

import pytest
import torch

from gelora_plugins import GeLoRAConfig, measure, plugins
from gelora_plugins.errors import DimensionError, ProbeError
from gelora_plugins.hookspecs import hookimpl
from gelora_plugins.ranks.policies import budget, gelora
from gelora_plugins.sensitivity import (
    Outcome,
    Sensitivity,
    _correlation,
    _Poolings,
    _rows,
    measure_sensitivity,
    settings,
)
from tests.support.plans import make_profile, make_sites
from tests.support.tiny import build
from tests.support.training import rows

CONFIG = GeLoRAConfig(probe_samples=120)


def found_in(found, name):
    return next(outcome for outcome in found.outcomes if outcome.setting.name == name)


@pytest.fixture(scope="module")
def found():
    return measure_sensitivity(build("llama"), rows(), CONFIG, base_rank=4, progress=False)


def test_the_chosen_settings_profile_is_what_a_probe_measures(found):
    alone = measure(build("llama"), rows(), CONFIG, progress=False)
    assert replace(found.profile, seconds=0.0) == replace(alone, seconds=0.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("as chosen", {}),
        ("estimator twonn", {"estimator": "twonn"}),
        ("pooling last", {"pooling": "last"}),
        ("rounding ceil", {"rounding": "ceil"}),
        ("standardised", {"standardise": True}),
    ],
)
def test_every_setting_gives_the_ranks_of_a_probe_of_its_own(found, name, options):
    outcome = found_in(found, name)
    config = replace(CONFIG, **options)
    alone = measure(build("llama"), rows(), config, progress=False)
    pairs = zip(make_sites(alone), costs(alone), strict=True)
    sites = [replace(site, parameters_per_rank=cost) for site, cost in pairs]
    assert outcome.ranks == {
        "gelora": tuple(gelora(alone, sites, 4, config)),
        "budget": tuple(budget(alone, sites, 4, config)),
    }


def costs(profile):
    blocks = profile.layout.blocks
    return [sum(linear.in_features + linear.out_features for linear in block.linears) for block in blocks]


def test_all_settings_together_take_one_forward_pass_per_document():
    model, documents = build("llama"), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: documents.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    measure_sensitivity(model, rows(), CONFIG, progress=False)
    assert sum(documents) == 120


def test_halves_of_the_documents_differ_from_each_other_and_are_the_same_again(found):
    half = next(setting for setting in settings(CONFIG) if setting.share == 1 / 2)
    chosen = {seed: _rows(120, half, seed).tolist() for seed in (0, 1)}
    other = _rows(120, replace(half, draw=2), 0).tolist()
    assert len(set(chosen[0])) == len(chosen[0]) == 60
    assert chosen[0] == _rows(120, half, 0).tolist() == sorted(chosen[0])
    assert len({tuple(choice) for choice in (chosen[0], chosen[1], other)}) == 3
    assert _rows(120, settings(CONFIG)[0], 0).tolist() == list(range(120))
    halves = [outcome.correlation for outcome in found.outcomes if outcome.setting.share == 1 / 2]
    assert len(halves) == 3
    assert None not in halves


def test_a_setting_that_cannot_be_measured_says_why_and_the_others_are_there(found):
    quarter = found_in(found, "quarter of documents")  # 30 of 120
    assert quarter.ranks == {}
    assert "expected at least 50" in quarter.reason
    assert any(line.startswith("quarter of documents: ") for line in found.lines())
    assert found_in(found, "estimator twonn").reason == ""


def test_a_chosen_setting_that_cannot_be_measured_is_an_error():
    with pytest.raises(DimensionError, match="expected at least 50"):
        measure_sensitivity(build("llama"), rows(40), CONFIG, progress=False)


def test_the_settings_are_what_differs_in_one_thing_from_the_chosen_one():
    names = [setting.name for setting in settings(GeLoRAConfig(pooling="last", standardise=True, rounding="floor"))]
    assert names[0] == "as chosen"
    assert {"pooling first", "pooling mean", "rounding nearest", "estimator twonn", "not standardised"} <= set(names)
    assert not {"pooling last", "rounding floor", "estimator twonn_mle", "standardised"} & set(names)


# --- poolings and estimators of plugins


@pytest.fixture
def pooling():
    """A function that registers a pooling `strange`."""
    registered = []

    def register(function):
        class Plugin:
            @staticmethod
            @hookimpl
            def register_poolings():
                return {"strange": function}

        registered.append(plugins.plugin_manager().register(Plugin))

    yield register
    for name in registered:
        plugins.plugin_manager().unregister(name=name)


def test_a_plugins_pooling_of_another_width_is_a_setting_too(pooling, found):
    # Every point twice, side by side: all distances grow by the same factor, and no dimension changes.
    pooling(lambda hidden, mask: plugins.find("pooling", "mean")(hidden, mask).repeat(1, 2))
    other = measure_sensitivity(build("llama"), rows(), CONFIG, base_rank=4, progress=False)
    assert found_in(other, "pooling strange").ranks == found_in(found, "as chosen").ranks
    assert found_in(other, "pooling last").ranks == found_in(found, "pooling last").ranks


def test_a_pooling_that_makes_no_points_is_named(pooling):
    pooling(lambda hidden, mask: hidden)
    with pytest.raises(ProbeError, match=r"The pooling 'strange' made points of shape \(16, \d+, 16\) of 16 documents"):
        measure_sensitivity(build("llama"), rows(), CONFIG, progress=False)


def test_poolings_whose_widths_vary_are_refused_where_that_could_mix_them_up():
    widths = iter([1, 2, 2, 1])
    poolings = _Poolings(dict.fromkeys("ab", lambda hidden, mask: torch.zeros(len(mask), next(widths))))
    hidden, mask = torch.zeros(3, 4, 5), torch.ones(3, 4, dtype=torch.bool)
    assert poolings(hidden, mask).shape == (3, 3)
    with pytest.raises(ProbeError, match="The poolings a, b make points of varying width"):
        poolings(hidden, mask)


# --- figures


def outcomes():
    chosen = settings(CONFIG)[0]
    other = replace(chosen, name="estimator twonn", estimator="twonn")
    return (
        Outcome(chosen, {"gelora": (1, 2, 3), "budget": (4, 8, 12)}, 1.0),
        Outcome(other, {"gelora": (1, 4, 1), "budget": (4, 8, 12)}, 0.5),
        Outcome(replace(other, name="[bold]none"), {}, None, "Too few."),
    )


def test_the_summary_by_hand():
    result = Sensitivity(make_profile([10.0, 10.0, 11.0, 13.0]), outcomes(), base_rank=8)
    assert result.summary(result.outcomes[1], "gelora") == {
        "mean": 2.0,
        "lowest": 1,
        "highest": 4,
        "blocks_that_differ": 2,
        "mean_difference": pytest.approx(4 / 3),
    }
    assert result.summary(result.outcomes[1], "budget")["blocks_that_differ"] == 0


def test_the_table_and_the_json_have_every_setting():
    result = Sensitivity(make_profile([10.0, 10.0, 11.0, 13.0]), outcomes(), base_rank=8)
    lines = str(result).splitlines()
    assert any("estimator twonn" in line and "0.50" in line and "1-4" in line and "1.33" in line for line in lines)
    assert any("[bold]none" in line for line in lines)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [outcome["setting"]["name"] for outcome in data["outcomes"]] == [o.setting.name for o in result.outcomes]
    assert data["outcomes"][1]["summary"]["gelora"]["highest"] == 4
    assert data["outcomes"][2]["reason"] == "Too few."


def test_the_correlation_is_of_ranks_and_leaves_unknown_growths_out():
    assert _correlation((1.0, 2.0, 50.0), (-3.0, 0.0, 1.0)) == pytest.approx(1.0)
    assert _correlation((1.0, 2.0, 3.0), (3.0, 2.0, 1.0)) == pytest.approx(-1.0)
    assert _correlation((None, 1.0, 2.0, 9.0), (5.0, 1.0, None, 2.0)) == pytest.approx(1.0)
    assert _correlation((0.0, 0.0, 0.0), (1.0, 2.0, 3.0)) is None
    assert _correlation((None, None), (1.0, 2.0)) is None
