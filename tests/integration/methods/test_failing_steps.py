"""A training that fails in a step leaves the model as it was."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support.steps import (
    METHODS,
    adapted,
    assert_equal,
    train,
)


class Fails(TrainerCallback):
    """Ends the training with an error in a step, after its first micro-batch."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("in a step")


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_fails_in_a_step_leaves_the_base_and_no_hooks(tmp_path: Path, name: str) -> None:
    model = adapted()
    before = {key: value.clone() for key, value in model.state_dict().items() if "lora_" not in key}
    with pytest.raises(RuntimeError, match="in a step"):
        train(model, tmp_path, METHODS[name](), Fails(), gradient_accumulation_steps=2)
    assert_equal({key: value for key, value in model.state_dict().items() if "lora_" not in key}, before)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())
