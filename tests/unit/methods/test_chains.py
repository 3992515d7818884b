"""Which ranks a chain trains when: the knots of COLA, the boosters of XGBLoRA."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gelora_plugins.errors import ConfigError, MethodError
from gelora_plugins.methods.cola import COLA, share
from gelora_plugins.methods.xgblora import XGBLoRA, draw, is_possible


def with_ranks(method, ranks, seed=0):
    """As at the start of training: modules q and v of each block have its rank, or those of a pair."""
    method.args = SimpleNamespace(seed=seed)
    method.pairs = [
        SimpleNamespace(name=f"layers.{i}.{module}", a=torch.zeros(r, 3))
        for i, rank in enumerate(ranks)
        for module, r in zip("qv", rank if isinstance(rank, tuple) else (rank, rank), strict=True)
    ]
    return method


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    layout = SimpleNamespace(blocks=[SimpleNamespace(name=f"layers.{i}") for i in range(12)])
    monkeypatch.setattr("gelora_plugins.methods.xgblora.find_layout", lambda model: layout)
    for kind in (COLA, XGBLoRA):
        monkeypatch.setattr(kind, "adapter", SimpleNamespace(model=None), raising=False)


def covered(parts, pairs):
    """module -> its ranks in the order in which they are trained."""
    return {pair.name: [i for part in parts for i in range(*part.slots[pair.name])] for pair in pairs}


@given(st.integers(0, 50), st.integers(1, 20))
def test_shares_are_the_whole_and_differ_by_one_at_most(whole, parts):
    edges = [share(k, whole, parts) for k in range(parts + 1)]
    assert (edges[0], edges[-1]) == (0, whole)
    assert {later - edge for edge, later in pairwise(edges)} <= {whole // parts, -(-whole // parts)}


def test_knots_divide_steps_and_ranks():
    method = with_ranks(COLA(knots=3), [6, 4, 2])
    parts = method.parts(10)
    assert [part.start for part in parts] == [0, 3, 7]
    assert [part.slots["layers.0.q"] for part in parts] == [(0, 2), (2, 4), (4, 6)]
    assert [part.slots["layers.1.v"] for part in parts] == [(0, 1), (1, 3), (3, 4)]
    assert [part.slots["layers.2.q"] for part in parts] == [(0, 1), (1, 1), (1, 2)]  # it rests in the second
    assert covered(parts, method.pairs) == {pair.name: list(range(len(pair.a))) for pair in method.pairs}


@pytest.mark.parametrize(("ranks", "steps"), [([4, 4], 2), ([2, 1], 100)])
def test_knots_without_a_step_or_a_rank_are_refused(ranks, steps):
    with pytest.raises(MethodError, match=rf"3 knots; the training has {steps} steps.* is {max(ranks)}\. .* fewer"):
        with_ranks(COLA(knots=3), ranks).parts(steps)


possible = st.lists(st.integers(1, 8), min_size=1, max_size=9).flatmap(
    lambda ranks: st.tuples(
        st.just(ranks), st.sampled_from([n for n in range(1, len(ranks) + 1) if is_possible(ranks, n)])
    )
)


@given(possible, st.integers(0, 5))
def test_boosters_hold_each_block_as_often_as_its_rank_says(ranks_and_size, seed):
    ranks, size = ranks_and_size
    boosters = draw(ranks, size, seed)
    assert {len(chosen) for chosen in boosters} == {size}
    assert [sum(i in chosen for chosen in boosters) for i in range(len(ranks))] == ranks
    assert boosters == draw(ranks, size, seed)


def test_the_draw_is_the_seeds():
    assert draw([8] * 12, 4, seed=0) != draw([8] * 12, 4, seed=1)


def test_each_booster_trains_rank_one_of_its_blocks():
    method = with_ranks(XGBLoRA(blocks=2), [4, 2, 6, 0][:3])
    parts = method.parts(20)
    assert [part.start for part in parts] == [0, 3, 6, 9, 12, 15]  # and the last one has five steps
    assert covered(parts, method.pairs) == {pair.name: list(range(len(pair.a))) for pair in method.pairs}
    for part in parts:
        sizes = {name: end - first for name, (first, end) in part.slots.items()}
        assert sorted(sizes.values()) == [0, 0, 1, 1, 1, 1]
        assert all(sizes[f"layers.{i}.q"] == sizes[f"layers.{i}.v"] for i in range(3))


def test_a_module_of_another_rank_than_its_block_shares_out_its_own():
    method = with_ranks(XGBLoRA(blocks=1), [(4, 2), (1, 3)])
    parts = method.parts(7)
    assert len(parts) == 7
    assert covered(parts, method.pairs) == {pair.name: list(range(len(pair.a))) for pair in method.pairs}


def test_a_third_of_the_blocks_or_fewer_make_a_booster_unless_said():
    assert len(with_ranks(XGBLoRA(), [8] * 12).parts(100)) == 24
    assert len(with_ranks(XGBLoRA(), [8] * 11 + [6]).parts(100)) == 47  # 94 ranks come out even with 2 blocks


def test_ranks_that_no_boosters_have_are_refused_with_the_numbers_that_do():
    with pytest.raises(MethodError, match=r"No boosters of 2 blocks .* 4, 1, 4: .* Possible here: blocks=1\."):
        with_ranks(XGBLoRA(blocks=2), [4, 1, 4]).parts(100)
    with pytest.raises(MethodError, match=r"No boosters of 3 blocks .* 5, 3, 4: .* Possible here: blocks=1 or 2\."):
        with_ranks(XGBLoRA(blocks=3), [5, 3, 4]).parts(100)
    with pytest.raises(MethodError, match=r"12 boosters for the 12 ranks .* 11 steps"):
        with_ranks(XGBLoRA(blocks=1), [5, 3, 4]).parts(11)


def test_a_module_outside_the_blocks_is_refused():
    method = with_ranks(XGBLoRA(), [4, 4])
    method.pairs.append(SimpleNamespace(name="lm_head", a=torch.zeros(4, 3)))
    with pytest.raises(MethodError, match=r"lm_head is in none\. Leave it out of target_modules"):
        method.parts(100)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(COLA, {"knots": 0}), (COLA, {"knots": 1.5}), (XGBLoRA, {"blocks": 0}), (XGBLoRA, {"blocks": 2.5})],
)
def test_options_out_of_range_are_refused(kind, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value}; expected a whole number of 1 or more"):
        kind(**options)
