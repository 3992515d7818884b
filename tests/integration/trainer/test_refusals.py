"""Bad input: refused before the first step, with the way out, and nothing has changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from gelora_plugins import GeLoRACallback, GeLoRAConfig, apply_plan, select_ranks
from gelora_plugins.errors import (
    ApplyError,
    ConfigError,
    DimensionError,
    GeLoRAError,
    PlanError,
    ProbeError,
    TooLateError,
)
from tests.support.tiny import build
from tests.support.training import LORA, layers, matrices, peft_model, rows, state_of, trainer_for


def trained() -> PeftModel:
    model = peft_model()
    with torch.no_grad():
        layers(model)["base_model.model.model.layers.2.mlp.up_proj"].lora_B["default"].weight[0, 0] = 1e-3
    return model


def with_nan() -> PeftModel:
    model = peft_model()
    with torch.no_grad():
        model.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight")[0, 0] = torch.nan
    return model


def constant() -> PeftModel:
    model = peft_model()
    with torch.no_grad():
        model.get_parameter("base_model.model.model.embed_tokens.weight")[:] = 1.0
    return model


def adagrad() -> dict[str, Any]:
    model = peft_model()
    return {"model": model, "optimizers": (torch.optim.Adagrad(model.parameters(), 0.1), None)}


CASES: dict[str, tuple[type[GeLoRAError], list[str], Callable[[], dict[str, Any]]]] = {
    "no LoRA": (
        ApplyError,
        ["no LoRA adapter", "get_peft_model", "lora_config"],
        lambda: {"model": build("llama")},
    ),
    "trained adapter": (
        ApplyError,
        ["trained already", "lora_B of model.layers.2.mlp.up_proj is not 0"],
        lambda: {"model": trained()},
    ),
    "pissa": (ApplyError, ["'pissa'", "select_ranks"], lambda: {"model": peft_model(init_lora_weights="pissa")}),
    "olora": (ApplyError, ["'olora'", "select_ranks"], lambda: {"model": peft_model(init_lora_weights="olora")}),
    "no initialisation": (
        ApplyError,
        ["False", "select_ranks"],
        lambda: {"model": peft_model(init_lora_weights=False)},
    ),
    "empty dataset": (ProbeError, ["empty"], lambda: {"train_dataset": Empty()}),
    "too few documents": (
        DimensionError,
        ["49 distinct documents", "at least 50", "probe_samples"],
        lambda: {"train_dataset": rows(49)},
    ),
    "repeats only": (
        DimensionError,
        ["3 distinct documents", "297 repeats"],
        lambda: {"train_dataset": rows(3) * 100},
    ),
    "NaN in a hidden state": (ProbeError, ["boundary 2", "not finite"], lambda: {"model": with_nan()}),
    "all points equal": (
        DimensionError,
        ["Boundary 1 has no dimension", "of 120 points are distinct"],
        lambda: {"model": constant()},
    ),
    "unknown policy": (
        ConfigError,
        ["policy 'budgt' does not exist", "budget, gelora, uniform"],
        lambda: {"callback": GeLoRACallback(GeLoRAConfig(policy="budgt"))},
    ),
    "unknown estimator": (
        ConfigError,
        ["estimator 'twonnn'", "twonn, twonn_mle"],
        lambda: {"callback": GeLoRACallback(GeLoRAConfig(estimator="twonnn"))},
    ),
    "unknown pooling": (
        ConfigError,
        ["pooling 'cls'", "first, last, mean"],
        lambda: {"callback": GeLoRACallback(GeLoRAConfig(pooling="cls"))},
    ),
    "user-passed optimizer": (TooLateError, ["has begun", "optimizer_cls_and_kwargs"], adagrad),
    "adapter and lora_config": (
        ApplyError,
        ["has an adapter already"],
        lambda: {"callback": GeLoRACallback(lora_config=LoraConfig(**LORA))},
    ),
}


class Empty(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 0

    def __getitem__(self, i: int) -> Any:
        raise IndexError(i)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_and_changes_nothing(tmp_path: Path, case: str) -> None:
    error, words, make = CASES[case]
    options = {"model": None, "callback": GeLoRACallback(), **make()}
    model = options.pop("model") or peft_model()
    trainer = trainer_for(model, tmp_path, options.pop("callback"), **options)
    before = state_of(model)
    with pytest.raises(error) as caught:
        trainer.train()
    for word in words:
        assert word in str(caught.value)
    assert state_of(model) == before
    assert not (tmp_path / "gelora").exists()


@pytest.mark.parametrize("init", ["corda", "loftq", "eva"])
def test_initialisations_that_need_more_than_the_weights_are_refused_too(tmp_path: Path, init: str) -> None:
    # Making such an adapter needs data or another library; what counts here is what its configuration says.
    model = peft_model()
    model.peft_config["default"].init_lora_weights = init
    trainer = trainer_for(model, tmp_path, GeLoRACallback())
    before = state_of(model)
    with pytest.raises(ApplyError, match=f"'{init}' cannot be run again"):
        trainer.train()
    assert state_of(model) == before


def test_a_callback_added_to_a_trainer_that_exists_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, None)
    trainer.add_callback(GeLoRACallback())
    before = matrices(trainer.model)
    with pytest.raises(TooLateError, match=r"exists already.*callbacks=\[GeLoRACallback\(\)\]"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in matrices(trainer.model).items())


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    select_ranks(peft_model("mistral", target_modules=["q_proj"]), rows(), progress=False).save(tmp_path / "plan.json")
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(plan=str(tmp_path / "plan.json")))
    before = state_of(trainer.model)
    with pytest.raises(PlanError, match="for another model, or for other target modules"):
        trainer.train()
    assert state_of(trainer.model) == before


@pytest.mark.parametrize(
    ("options", "found"),
    [({"lora_alpha": 16}, "has 4 "), ({"use_rslora": True}, "has 4 "), ({"r": 8}, "has 1 ")],
    ids=["alpha", "rslora", "r"],
)
def test_a_plan_with_another_scaling_is_refused(tmp_path: Path, options: dict[str, Any], found: str) -> None:
    plan = select_ranks(peft_model(), rows(), progress=False)
    plan.save(tmp_path / "plan.json")
    trainer = trainer_for(peft_model(**options), tmp_path, GeLoRACallback(plan=str(tmp_path / "plan.json")))
    with pytest.raises(PlanError, match="keeps the scaling 2") as caught:
        trainer.train()
    assert found in str(caught.value)
    with pytest.raises(PlanError, match="keeps the scaling 2"):
        apply_plan(peft_model(**options), plan)


@pytest.mark.parametrize("text", ["", "{", '{"kind": "rank_plan"}', "[]"])
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json"):
        trainer_for(peft_model(), tmp_path, GeLoRACallback(plan=str(path))).train()


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json cannot be read"):
        trainer_for(peft_model(), tmp_path, GeLoRACallback(plan=str(tmp_path / "nowhere.json"))).train()
