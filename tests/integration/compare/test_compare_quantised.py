"""`gelora compare` with the pretrained weights in 4 bits, as in QLoRA."""

from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch

from gelora_plugins.compare.allocations import lora
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.train import adapted, head_of, run
from gelora_plugins.errors import ConfigError
from gelora_plugins.findings.record import Run
from tests.support.comparing import SETTINGS, UNEVEN, compare_tiny, save_model, tiny_task

FOUR_BITS = replace(SETTINGS, rates=(1e-2,), seeds=1, load_in_4bit=True, methods=("lora",))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def test_every_method_trains_on_four_bits_with_equal_parameters(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gelora_plugins.compare.train._constant", lambda *_: float("inf"))  # where a training goes
    axes = {"allocations": ("plan", "uniform"), "methods": ("lora", "eva", "flat_lora", "rm_lora")}
    found = compare_tiny(model, tmp_path, replace(FOUR_BITS, **axes))
    assert not found.gaps
    assert {result.parameters for result in found.results} == {12 * 4 * 32}
    assert " in 4 bits, 40 training rows" in found.to_markdown()


def test_the_base_is_quantised_the_head_and_the_adapter_are_not(model: str, tmp_path: Path) -> None:
    bench = Bench(model, tiny_task(), FOUR_BITS, tmp_path)
    recipe = lora(UNEVEN, bench.sites)
    wrapped = adapted(bench, recipe, 0)
    bases = [m.base_layer for m in wrapped.modules() if hasattr(m, "base_layer")]
    assert len(bases) == len(bench.targets)
    assert {type(base) for base in bases} == {bitsandbytes.nn.Linear4bit}
    trained = [*head_of(wrapped), *(p for name, p in wrapped.named_parameters() if ".lora_" in name)]
    assert {p.dtype for p in trained} == {torch.float32}
    assert bench.num_parameters == replace(bench, settings=SETTINGS).num_parameters
    with_it, without = (
        run(replace(bench, settings=settings), Run("mine", "mine", recipe, 0, 1e-3, choosing=False))["loss"]
        for settings in (FOUR_BITS, replace(FOUR_BITS, load_in_4bit=None))
    )
    assert with_it != without


def test_what_is_recorded_in_four_bits_is_not_taken_for_what_was_whole(model: str, tmp_path: Path) -> None:
    whole = Bench(model, tiny_task(), replace(FOUR_BITS, load_in_4bit=None), tmp_path)
    assert Bench(model, tiny_task(), FOUR_BITS, tmp_path).cache != whole.cache
    assert "load_in_4bit" not in whole.identity["training"]  # which earlier records have not


def test_full_fine_tuning_of_four_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave out full"):
        replace(FOUR_BITS, methods=("lora", "full"))
