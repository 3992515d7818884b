import gc
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from gelora_plugins.dimension.estimators import twonn_mle
from gelora_plugins.errors import ProbeError
from gelora_plugins.probe.point_store import KINDS, FeatureStore, own_pages

SIZES = (5, 3, 4)  # of the batches
FEATURES = (6, 6, 9)  # at each boundary


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, d, generator=generator) for d in FEATURES] for n in SIZES]


def filled(kind, given):
    store = FeatureStore(kind, sum(SIZES))
    for batch in given:
        store.append(batch)
    return store


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_points_come_back_as_they_were(kind):
    given = batches()
    with filled(kind, given) as store:
        assert len(store) == 3
        assert store.num_filled == 12
        for points, *expected in zip(store, *given, strict=True):
            assert torch.equal(points, torch.cat(expected))
        assert torch.equal(store[-1], store[2])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_taken_back_and_added_again(kind):
    first, second, other = batches()
    with filled(kind, [first, other, second]) as store:
        store.truncate(5)
        assert [len(points) for points in store] == [5, 5, 5]
        store.append(second)
        expected = filled(kind, [first, second])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(store, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_may_change_afterwards(kind):
    given = batches()
    kept = filled(kind, batches())
    store = FeatureStore(kind, sum(SIZES))
    for batch in given:
        store.append(batch)
        for points in batch:
            points.zero_()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(store, kept, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_more_documents_than_there_is_room_for_are_an_error(kind):
    store = FeatureStore(kind, 7)
    store.append(batches()[0])
    with pytest.raises(ProbeError, match=r"hold 8 documents so far; expected 7 in all.*one document of each row"):
        store.append(batches()[1])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_held_after_the_context(kind):
    gc.collect()  # what earlier tests left is not closed in between
    before = os.listdir("/proc/self/fd")
    with filled(kind, batches()) as store:
        assert len(os.listdir("/proc/self/fd")) == len(before) + (3 if kind == "disk" else 0)
    gc.collect()
    assert len(store) == 0
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_files_have_no_name_that_a_killed_process_could_leave_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with filled("disk", batches()) as store:
        assert list(tmp_path.iterdir()) == []
        assert len(store) == 3


def test_a_full_disk_is_an_error_that_says_what_to_do(monkeypatch):
    store = FeatureStore("disk", 2000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(ProbeError, match=r"cannot be written to .*File too large.* Set TMPDIR to a directory with"):
            store.append([torch.randn(2000, 10)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)


def test_pages_of_ones_own_take_memory_only_once_they_are_written():
    before = resident()
    pages = own_pages((1024, 2**16), torch.float32)  # 256 MiB
    assert resident() - before < 2**23
    pages[:256] = 1
    assert resident() - before > 2**26 - 2**23
    assert pages[:256].eq(1).all()
    assert not pages[256:258].any()


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# Half


def hidden_like(dimension, n=1000, num_features=256, seed=0):
    """Points as hidden states have them: on a curved surface, far from the origin, one coordinate that varies much."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(n, dimension, generator=generator)
    points = torch.tanh(source @ torch.randn(dimension, num_features, generator=generator) / 2)
    points += 50 * torch.randn(num_features, generator=generator)
    points[:, 0] += 3000
    points[:, 1] *= 30
    return points


@pytest.mark.parametrize("dimension", [4, 12])
@pytest.mark.parametrize("seed", range(3))
def test_sixteen_bits_change_the_dimension_by_less_than_a_hundredth_of_its_standard_error(dimension, seed):
    points = hidden_like(dimension, seed=seed)
    store = FeatureStore("half", len(points))
    for batch in points.split(16):
        store.append([batch])
    exact, half, naive = twonn_mle(points), twonn_mle(store[0]), twonn_mle(points.half().float())
    assert abs(half.value - exact.value) < 0.01 * exact.std_error
    assert abs(naive.value - exact.value) > 0.01 * exact.std_error, "float16 alone would do"


def test_sixteen_bits_keep_repeats_and_points_that_coincide():
    points = hidden_like(5, n=100)
    points[50:60] = points[:10]
    same = torch.full((100, 8), 7.3)
    store = FeatureStore("half", 100)
    for rows in torch.arange(100).split(16):
        store.append([points[rows], same[rows]])
    assert torch.equal(store[0][50:60], store[0][:10])
    assert torch.equal(store[1], store[1][:1].expand(100, 8))


def test_sixteen_bits_reach_far_beyond_the_range_of_float16():
    points = torch.tensor([[1e9, 1.0], [-2e9, 3.0], [5e8, -1.0]])
    store = FeatureStore("half", 3)
    store.append([points])
    assert torch.allclose(store[0][:, 0], points[:, 0], rtol=1e-3)


def test_sixteen_bits_keep_the_other_points_where_one_is_far_away():
    points = hidden_like(5, n=100)
    points[3] *= 1e7
    store = FeatureStore("half", 100)
    for batch in points.split(16):
        store.append([batch])
    others = torch.arange(100) != 3
    differences = points[others] - points[others].median(dim=0).values
    # The rounding of float16 is 2^-12, and the median of a batch is at most as far from that of all as a point is.
    assert (store[0][others] - points[others]).abs().max() < 2**-12 * 2 * differences.abs().max()
