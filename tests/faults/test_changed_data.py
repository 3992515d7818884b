"""The training data is another one when training goes on: the ranks of the checkpoint hold, nothing is measured."""

from pathlib import Path
from typing import Any

import pytest

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.errors import DimensionError, PlanError
from gelora_plugins.plugins import plugin_manager
from tests.support.training import peft_model, ranks_by_block, rows, saved_plan, trainer_for

CALLBACK = {"policy": "budget"}
SAVING = {"save_strategy": "steps", "save_steps": 2}
DATA = {"shrunk": rows(10), "other": rows(seed=1), "repeated": rows(3) * 40, "grown": rows(300)}


def run(directory: Path, steps: int, dataset: Any, resume: Any = None) -> Any:
    callback = GeLoRACallback(GeLoRAConfig(**CALLBACK))
    trainer = trainer_for(peft_model(), directory, callback, max_steps=steps, train_dataset=dataset, **SAVING)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("change", DATA)
def test_training_goes_on_with_the_ranks_of_the_checkpoint(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path, 2, rows())
    plan = saved_plan(tmp_path)
    assert set(plan.ranks) != {4}
    # No estimator is asked, whatever the data would measure.
    monkeypatch.setattr(plugin_manager().hook, "register_estimators", None)
    second = run(tmp_path, 4, DATA[change], resume=True)
    assert ranks_by_block(second.model) == ranks_by_block(first.model) == list(plan.ranks)
    assert second.state.global_step == 4
    assert saved_plan(tmp_path) == plan  # with the fingerprint of the data that was measured


def test_the_shrunken_data_alone_would_have_been_refused(tmp_path: Path) -> None:
    with pytest.raises(DimensionError, match="10 distinct documents"):
        run(tmp_path, 2, DATA["shrunk"])


@pytest.mark.parametrize("damage", ["half", "missing"])
def test_a_checkpoint_that_was_killed_while_it_was_written_is_named(tmp_path: Path, damage: str) -> None:
    run(tmp_path, 4, rows())
    path = tmp_path / "checkpoint-4" / "adapter_config.json"
    half = path.read_text()[:100]
    path.unlink()
    if damage == "half":
        path.write_text(half)
    with pytest.raises(PlanError, match=r"checkpoint-4.*adapter_config\.json"):
        run(tmp_path, 6, rows(), resume=True)
    trainer = run(tmp_path, 6, rows(), resume=str(tmp_path / "checkpoint-2"))
    assert ranks_by_block(trainer.model) == list(saved_plan(tmp_path).ranks)
