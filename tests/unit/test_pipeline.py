"""What `measure` makes of memory that runs out, of a target for the standard error, and of where features wait."""

import logging
import random

import pytest
import torch

from gelora_plugins import GeLoRAConfig, measure, pipeline
from gelora_plugins.errors import DimensionError, ProbeError
from gelora_plugins.probe.documents import choose_documents
from tests.support.tiny import VOCABULARY, build
from tests.support.training import rows

MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
]


def profile_of(model, dataset, **options):
    return measure(model, dataset, GeLoRAConfig(**options), progress=False)


def limited(error, most):
    """A model that takes no more than `most` documents in a batch, and the sizes of the batches that it was given."""
    model, sizes = build("llama"), []

    def hook(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > most:
            raise error

    model.model.layers[1].register_forward_pre_hook(hook)
    return model, sizes


def same(profile, other):
    found, expected = profile.to_dict(), other.to_dict()
    found.pop("seconds"), expected.pop("seconds")
    return found == expected


@pytest.mark.parametrize("error", MEMORY, ids=["CUDA", "CPU"])
def test_batches_are_halved_until_they_fit_and_the_profile_is_that_of_the_smaller_batches(error, caplog):
    model, sizes = limited(error, most=5)
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        profile = profile_of(model, rows(90), probe_batch_size=16)
    assert sizes == [16, 8, *[4] * 22, 2]
    assert same(profile, profile_of(build("llama"), rows(90), probe_batch_size=4))
    assert [record.getMessage().partition("; ")[2] for record in caplog.records] == [
        f"trying again with {n} documents in a batch." for n in (8, 4)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_memory_that_runs_out_later_lets_the_documents_be_read_again():
    model, sizes = limited(MEMORY[0], most=100)

    def later(module, args):
        if len(sizes) == 3:
            raise MEMORY[0]

    handle = model.model.layers[1].register_forward_pre_hook(later)
    profile = profile_of(model, rows(90), probe_batch_size=16)
    handle.remove()
    assert sizes == [16, 16, 16, *[8] * 11, 2]
    assert same(profile, profile_of(build("llama"), rows(90), probe_batch_size=8))


def test_one_document_that_does_not_fit_is_an_error_that_says_what_to_do():
    model, sizes = limited(MEMORY[0], most=0)
    with pytest.raises(ProbeError, match=r"^Memory ran out in a forward pass with one document\. Lower probe_max_len"):
        profile_of(model, rows(90), probe_batch_size=4)
    assert sizes == [4, 2, 1]


def test_another_error_is_not_taken_for_one_of_memory():
    model, sizes = limited(RuntimeError("shapes do not match"), most=5)
    with pytest.raises(ProbeError, match="RuntimeError: shapes do not match"):
        profile_of(model, rows(90), probe_batch_size=16)
    assert sizes == [16]


@pytest.mark.parametrize("storage", ["half", "disk"])
def test_the_profile_does_not_depend_on_where_the_points_wait(storage):
    expected = profile_of(build("llama"), rows())
    profile = profile_of(build("llama"), rows(), feature_storage=storage)
    if storage == "disk":
        assert same(profile, expected)
    for ours, theirs in zip(profile.estimates, expected.estimates, strict=True):
        assert abs(ours.value - theirs.value) <= 0.01 * theirs.std_error


def many_rows(n):
    rng = random.Random(0)
    return [{"input_ids": [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(3, 6))]} for _ in range(n)]


def test_without_a_target_all_documents_are_read_at_once():
    profile = profile_of(build("llama"), many_rows(600))
    assert profile.num_documents == 600
    assert profile.target_std_error is None


@pytest.mark.parametrize(("target", "read"), [(1000.0, 256), (1e-9, 700)])
def test_documents_are_read_until_the_target_or_to_the_last(target, read):
    dataset, sizes = many_rows(900), []
    model = build("llama")
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    profile = profile_of(model, dataset, target_std_error=target, probe_samples=700, probe_batch_size=100)
    assert sum(sizes) == profile.num_documents == read
    assert sizes == ([100, 100, 56] if read == 256 else [100, 100, 56, 100, 100, 56, 100, 88])
    assert (max(profile.growth_std_errors()) <= target) == (read == 256)
    chosen = choose_documents(dataset, GeLoRAConfig(probe_samples=700), model.config, None)
    assert profile.data_fingerprint == chosen.fingerprint(read) != chosen.fingerprint(read - 1)
    assert profile.num_tokens == sum(len(document[0]) for document in chosen.documents[:read])


def test_a_target_between_stops_between():
    errors = {}
    for samples in (256, 512, 1024):
        errors[samples] = max(profile_of(build("llama"), many_rows(1024), probe_samples=samples).growth_std_errors())
    assert errors[256] > errors[512]
    target = (errors[256] + errors[512]) / 2
    profile = profile_of(build("llama"), many_rows(1024), probe_samples=1024, target_std_error=target)
    assert profile.num_documents == 512
    assert max(profile.growth_std_errors()) == pytest.approx(errors[512], rel=0.2)


def test_a_beginning_without_a_dimension_is_no_reason_to_stop(monkeypatch):
    asked = []
    estimate = pipeline.estimate_dimensions

    def failing_first(points, *args, **kwargs):
        asked.append(len(points[0]))
        if len(asked) == 1:
            raise DimensionError("12 of 256 documents have a point of their own")
        return estimate(points, *args, **kwargs)

    monkeypatch.setattr(pipeline, "estimate_dimensions", failing_first)
    assert profile_of(build("llama"), many_rows(600), target_std_error=1e9).num_documents == 512
    asked.clear()
    with pytest.raises(DimensionError, match="12 of 256"):
        profile_of(build("llama"), many_rows(256), target_std_error=1e9)
