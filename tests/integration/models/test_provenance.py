"""What a plan remembers of the model and the options that it was made with, and what keeps nothing alive."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan, select_ranks, with_plan
from gelora_plugins.plugins import find_layout
from gelora_plugins.probe.provenance import model_fingerprint, model_name
from tests.support import plans
from tests.support.tiny import build
from tests.support.training import LORA, peft_model, rows, trainer_for


def fingerprint(model: Any) -> str | None:
    return model_fingerprint(model, find_layout(model))


def test_a_plan_records_all_options_and_the_model() -> None:
    config = GeLoRAConfig(policy="uniform", standardise=True, probe_samples=60, probe_max_length=9)
    model = build("llama")
    model.config._name_or_path = "somebody/llama"
    profile = select_ranks(model, rows(60), config, progress=False).profile
    how = ("method", "plan", "on_failure", "probe_batch_size", "feature_storage")
    assert profile.options == {name: value for name, value in config.to_dict().items() if name not in how}
    assert (profile.model_name, profile.model_fingerprint) == ("somebody/llama", fingerprint(model))


def test_a_path_is_recorded_by_its_last_part(tmp_path: Path) -> None:
    model = build("llama")
    assert model_name(model) is None
    model.config._name_or_path = str(tmp_path / "mine")
    assert model_name(model) == "mine"


def test_the_fingerprint_is_that_of_the_base_weights() -> None:
    bare = fingerprint(build("llama"))
    assert bare is not None
    assert bare.startswith("float32:")
    assert fingerprint(peft_model()) == fingerprint(build("llama")) == bare
    assert fingerprint(build("llama", seed=1)) != bare
    assert str(fingerprint(build("llama").to(torch.bfloat16))).startswith("bfloat16:")
    assert fingerprint(build("llama").to("meta")) is None


def old(plan: RankPlan) -> dict[str, Any]:
    """`plan` as earlier versions wrote it."""
    data: dict[str, Any] = json.loads(json.dumps(plan.to_dict()))
    for name in ("options", "model_name", "model_fingerprint"):
        del data["profile"][name]
    for site in data["sites"]:
        del site["max_rank"]
    return data


def test_a_plan_of_an_earlier_version_is_read_and_fits_its_model() -> None:
    plan = plans.plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA))
    read = RankPlan.from_dict(old(plan))
    assert read.ranks == plan.ranks
    with_plan(LoraConfig(**LORA), read, build("llama"))


@pytest.mark.parametrize("way", ["in place", "as built", "resume"])
@pytest.mark.parametrize("same", [True, False])
def test_a_plan_of_another_checkpoint_is_used_with_a_warning(
    tmp_path: Path, way: str, same: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plans.plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA))
    theirs = fingerprint(build("llama", seed=0 if same else 1))
    profile = dataclasses.replace(plan.profile, model_name="theirs", model_fingerprint=theirs)
    plan = dataclasses.replace(plan, profile=profile)
    plan.save(tmp_path / "plan.json")
    config = LoraConfig(**LORA) if way == "in place" else with_plan(LoraConfig(**LORA), plan)
    model = get_peft_model(build("llama"), config)
    options: dict[str, Any] = {}
    if way == "resume":
        trainer_for(model, tmp_path, None, max_steps=1, save_strategy="steps", save_steps=1).train()
        plan.save(tmp_path / "checkpoint-1" / "gelora" / "plan.json")
        options["resume_from_checkpoint"] = str(tmp_path / "checkpoint-1")
        callback = GeLoRACallback()
    else:
        callback = GeLoRACallback(plan=str(tmp_path / "plan.json"))
    trainer_for(model, tmp_path, callback).train(**options)
    assert caplog.text.count("The plan was measured on theirs") == (0 if same else 1)


def test_one_callback_for_several_trainers_keeps_no_model_alive(tmp_path: Path) -> None:
    plans.plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA)).save(tmp_path / "plan.json")
    callback = GeLoRACallback(plan=str(tmp_path / "plan.json"))
    models = []
    for number in range(3):
        trainer = trainer_for(peft_model(), tmp_path / str(number), callback, max_steps=1)
        trainer.train()
        models.append(weakref.ref(trainer.model))
    del trainer
    gc.collect()
    assert [model() for model in models] == [None] * 3
