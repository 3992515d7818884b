"""Code of the user's own that raises while ranks are chosen: named, before the first step, and nothing has changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import default_data_collator

from gelora_plugins import GeLoRACallback, GeLoRAConfig, hookimpl
from gelora_plugins.errors import DimensionError, GeLoRAError, PluginError, ProbeError
from gelora_plugins.plugins import plugin_manager
from tests.support.training import losses, matrices, peft_model, ranks_by_block, rows, state_of, trainer_for


class Broken:
    """A plugin whose every function divides by zero; `error` is raised instead when there is one."""

    error: Exception | None = None

    def fail(self) -> Callable[..., Any]:
        def broken(*arguments: Any, **keywords: Any) -> Any:
            if self.error is not None:
                raise self.error
            return 1 / 0

        return broken

    @hookimpl
    def register_estimators(self) -> dict[str, Callable[..., Any]]:
        return {"broken": self.fail()}

    @hookimpl
    def register_poolings(self) -> dict[str, Callable[..., Any]]:
        return {"broken": self.fail()}

    @hookimpl
    def register_rank_policies(self) -> dict[str, Callable[..., Any]]:
        return {"broken": self.fail()}


@pytest.fixture
def plugin() -> Iterator[Broken]:
    broken = Broken()
    plugin_manager().register(broken, "mine")
    yield broken
    plugin_manager().unregister(broken)


class FailsOnce:
    """A collator that fails the first time that it is called, which is in the probe."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == 1:
            raise ZeroDivisionError("division by zero")
        made: dict[str, torch.Tensor] = default_data_collator(
            [{"input_ids": row["words"], "labels": row["words"]} for row in batch]
        )
        return made


def options(kind: str) -> tuple[dict[str, str], dict[str, Any]]:
    """What goes to GeLoRAConfig and what to the Trainer, so that this kind of function fails."""
    if kind != "collator":
        return {kind: "broken"}, {}
    dataset = [{"words": row["input_ids"]} for row in rows()]
    return {}, {"train_dataset": dataset, "data_collator": FailsOnce(), "remove_unused_columns": False}


SAID = {
    "collator": (ProbeError, "The data collator failed on rows with the fields words: ZeroDivisionError: division by"),
    **{
        kind: (
            PluginError,
            f"The {kind} 'broken' of the gelora plugin 'mine' fails: ZeroDivisionError: division by zero",
        )
        for kind in ("pooling", "estimator", "policy")
    },
}


@pytest.mark.parametrize("kind", SAID)
def test_the_run_stops_before_the_first_step_and_names_the_culprit(tmp_path: Path, plugin: Broken, kind: str) -> None:
    error, words = SAID[kind]
    config, rest = options(kind)
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(**config)), **rest)
    before = state_of(trainer.model)
    with pytest.raises(error) as caught:
        trainer.train()
    assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert state_of(trainer.model) == before
    assert trainer.state.global_step == 0
    assert not (tmp_path / "gelora").exists()


@pytest.mark.parametrize("kind", SAID)
def test_with_keep_it_trains_with_the_users_ranks_as_without_gelora(
    tmp_path: Path, plugin: Broken, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    config, rest = options(kind)
    callback = GeLoRACallback(GeLoRAConfig(on_failure="keep", **config))
    trainer = trainer_for(peft_model(), tmp_path / "a", callback, **rest)
    trainer.train()
    assert SAID[kind][1] in caplog.text
    assert ranks_by_block(trainer.model) == [4, 4, 4]
    without = trainer_for(peft_model(), tmp_path / "b", None, **rest)
    without.train()
    assert losses(trainer) == losses(without)
    assert all(value.equal(matrices(without.model)[name]) for name, value in matrices(trainer.model).items())


@pytest.mark.parametrize("kind", ["pooling", "estimator", "policy"])
def test_an_error_that_says_what_to_do_is_not_wrapped(tmp_path: Path, plugin: Broken, kind: str) -> None:
    plugin.error = DimensionError("Take more rows.")
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(**options(kind)[0])))
    with pytest.raises(GeLoRAError, match=r"Take more rows\.$") as caught:
        trainer.train()
    assert not isinstance(caught.value, PluginError)
