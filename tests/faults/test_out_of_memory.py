"""Memory runs out while the probe runs: it goes on with smaller batches, and training does not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gelora_plugins import GeLoRACallback, GeLoRAConfig, hookimpl
from gelora_plugins.errors import ProbeError
from gelora_plugins.plugins import plugin_manager
from tests.support.training import losses, matrices, peft_model, ranks_by_block, saved_plan, state_of, trainer_for


def run_out(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def fits(model: nn.Module, most: int) -> list[int]:
    """Let a forward pass of a block with more than `most` documents run out of memory; the sizes of all are noted.

    Training has one document in a batch, and the block is the second, so that hooks have run when it happens.
    """
    sizes: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        sizes.append(len(hidden))
        if len(hidden) > most:
            run_out()

    model.get_submodule("base_model.model.model.layers.1").register_forward_pre_hook(before, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("most", [1, 4, 15])
def test_training_goes_on_as_if_nothing_had_been(tmp_path: Path, most: int) -> None:
    config = GeLoRAConfig(policy="budget", probe_batch_size=16)
    plenty = trainer_for(peft_model(), tmp_path / "a", GeLoRACallback(config))
    plenty.train()
    little = trainer_for(peft_model(), tmp_path / "b", GeLoRACallback(config))
    sizes = fits(little.model, most)
    little.train()
    assert sizes[0] == 16
    assert {1: 1, 4: 4, 15: 8}[most] in sizes
    assert saved_plan(tmp_path / "b").ranks == saved_plan(tmp_path / "a").ranks != (4, 4, 4)
    assert ranks_by_block(little.model) == list(saved_plan(tmp_path / "a").ranks)
    assert losses(little) == losses(plenty)
    assert all(value.equal(matrices(plenty.model)[name]) for name, value in matrices(little.model).items())


def test_where_one_document_is_too_much_the_run_stops_and_nothing_has_changed(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback())
    fits(trainer.model, 0)
    before = state_of(trainer.model)
    with pytest.raises(ProbeError, match="Memory ran out in a forward pass with one document"):
        trainer.train()
    assert state_of(trainer.model) == before
    assert trainer.state.global_step == 0


def test_a_pooling_of_a_plugin_may_run_out_too(tmp_path: Path) -> None:
    seen: list[int] = []

    def greedy(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        if len(hidden) > 4:
            run_out()
        return hidden.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)

    class Plugin:
        @hookimpl
        def register_poolings(self) -> dict[str, Callable[..., Any]]:
            return {"greedy": greedy}

    plugin = Plugin()
    plugin_manager().register(plugin, "greedy")
    try:
        trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(pooling="greedy"))).train()
    finally:
        plugin_manager().unregister(plugin)
    assert max(seen) > 4
    assert saved_plan(tmp_path).profile.num_documents == 120
