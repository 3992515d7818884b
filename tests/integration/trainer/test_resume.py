"""Training that goes on from a checkpoint: with its ranks, as if never interrupted, and nothing is measured again."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan
from gelora_plugins.errors import ApplyError, PlanError, TooLateError
from gelora_plugins.report.table import plan_table, render
from tests.support.resuming import BUDGET, check_continued, probes, start, without_pictures
from tests.support.tiny import build
from tests.support.training import LORA, layers, peft_model, ranks_by_block, saved_plan

__all__ = ["probes", "without_pictures"]  # fixtures


# Where the checkpoint is

PLACES: dict[str, Callable[[Path], tuple[Path, Any]]] = {
    "the last one": lambda out: (out, True),
    "a path": lambda out: (out, str(out / "checkpoint-2")),
    "a path object": lambda out: (out, out / "checkpoint-2"),
    "a path with a slash at its end": lambda out: (out, f"{out / 'checkpoint-2'}/"),
    "of another output directory": lambda out: (out.parent / "other", str(out / "checkpoint-2")),
    "moved": lambda out: (
        out.parent / "other",
        shutil.move(out / "checkpoint-2", out.parent / "elsewhere" / "renamed"),
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_resuming_goes_on_as_if_never_interrupted(tmp_path: Path, probes: list[str], place: str) -> None:
    whole = start(peft_model(), tmp_path / "out")
    whole.train()
    plan = saved_plan(tmp_path / "out")
    assert set(plan.ranks) != {4}
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    (tmp_path / "elsewhere").mkdir()
    directory, checkpoint = PLACES[place](tmp_path / "out")
    resumed = start(peft_model(), directory)
    resumed.train(resume_from_checkpoint=checkpoint)
    check_continued(resumed, whole)
    assert ranks_by_block(resumed.model) == list(plan.ranks)
    assert probes == ["measured"]
    assert saved_plan(directory) == plan


def test_every_checkpoint_and_every_saved_model_has_its_plan(tmp_path: Path) -> None:
    trainer = start(peft_model(), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "final"):
        assert RankPlan.load(tmp_path / name / "gelora" / "plan.json") == saved_plan(tmp_path)
    assert len(saved_plan(tmp_path).profile.data_fingerprint) == 64


# What is resumed


def bare_with(**options: Any) -> Callable[[], tuple[Any, GeLoRACallback]]:
    return lambda: (build("llama"), GeLoRACallback(BUDGET, lora_config=LoraConfig(**{**LORA, **options})))


def wrapped_with(**options: Any) -> Callable[[], tuple[Any, GeLoRACallback]]:
    return lambda: (peft_model(**options), GeLoRACallback(BUDGET))


def named() -> tuple[Any, GeLoRACallback]:
    torch.manual_seed(0)
    return get_peft_model(build("llama"), LoraConfig(**LORA), adapter_name="mine"), GeLoRACallback(BUDGET)


def beside_another() -> tuple[Any, GeLoRACallback]:
    model = peft_model()
    model.add_adapter("second", LoraConfig(**{**LORA, "r": 3}))
    model.set_adapter("second")
    return model, GeLoRACallback(BUDGET)


MODELS = {
    "wrapped": wrapped_with(),
    "bare": bare_with(),
    "bare PiSSA": bare_with(init_lora_weights="pissa"),
    "bare OLoRA": bare_with(init_lora_weights="olora"),
    "rsLoRA": wrapped_with(use_rslora=True),
    "DoRA": wrapped_with(use_dora=True),
    "with a pattern of one's own": wrapped_with(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}),
    "with modules to save": wrapped_with(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "with an adapter of another name": named,
    "with a second adapter": beside_another,
}


@pytest.mark.parametrize("kind", MODELS)
def test_each_kind_of_adapter_resumes(tmp_path: Path, probes: list[str], kind: str) -> None:
    model, callback = MODELS[kind]()
    whole = start(model, tmp_path, callback)
    whole.train()
    model, callback = MODELS[kind]()
    resumed = start(model, tmp_path, callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)
    assert probes == ["measured"]


def test_a_model_without_adapter_resumes_without_saying_which_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = start(peft_model(), tmp_path)
    whole.train()
    resumed = start(build("llama"), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)
    assert f"rank {ranks_by_block(whole.model)[0]} for " in caplog.text


def test_a_model_with_add_adapter_cannot_be_resumed_by_the_trainer_and_is_left_as_it_was(tmp_path: Path) -> None:
    # transformers 5.23 loads the adapters of a PeftModel only; of this one it looks for a sharded model.
    def make() -> Any:
        model = build("llama")
        model.add_adapter(LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
        return model

    start(make(), tmp_path).train()
    resumed = start(make(), tmp_path)
    with pytest.raises(ApplyError, match="get_peft_model"):
        resumed.train(resume_from_checkpoint=True)
    assert {layer.r["default"] for layer in layers(resumed.model).values()} == {4}


# What is said, and what decides


def test_the_output_shows_the_ranks_of_the_checkpoint_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    start(peft_model(), tmp_path).train()
    capsys.readouterr()
    caplog.clear()
    start(peft_model(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert render(plan_table(saved_plan(tmp_path))) in capsys.readouterr().out
    assert f"GeLoRA restored the ranks of the checkpoint {tmp_path / 'checkpoint-2'}: rank " in caplog.text
    assert "Nothing was measured." in caplog.text
    assert "The options now" not in caplog.text


def test_other_options_change_nothing_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = start(peft_model(), tmp_path)
    whole.train()
    measured = {"standardise": True, "target_std_error": 0.5, "probe_samples": 99, "probe_max_length": 32}
    other = GeLoRACallback(GeLoRAConfig(policy="uniform", pooling="last", probe_seed=3, **measured))
    resumed = start(peft_model(), tmp_path, other)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    check_continued(resumed, whole)
    for words in ("policy is uniform, the checkpoint's budget", "pooling is last", "probe_seed is 3"):
        assert words in caplog.text
    for name, value in measured.items():
        assert f"{name} is {value}, the checkpoint's" in caplog.text
    assert "start without resuming" in caplog.text


def test_a_plan_in_the_options_is_not_read_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = start(peft_model(), tmp_path)
    whole.train()
    dataclasses.replace(saved_plan(tmp_path), ranks=(1, 1, 1)).save(tmp_path / "another.json")
    resumed = start(peft_model(), tmp_path, GeLoRACallback(plan=str(tmp_path / "another.json")))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)
    assert "another.json was not used" in caplog.text


def test_a_checkpoint_that_was_trained_without_gelora(
    tmp_path: Path, probes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = start(peft_model(), tmp_path, TrainerCallback())
    whole.train()
    resumed = start(peft_model(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)
    assert probes == []
    assert "rank 4 for 21 modules. Nothing was measured. No plan lies beside it" in caplog.text
    assert "policy budget was not used" in caplog.text
    assert not (tmp_path / "gelora").exists()
    assert not (tmp_path / "checkpoint-6" / "gelora").exists()


@pytest.mark.parametrize("damage", ["another plan", "no JSON"])
def test_a_plan_beside_the_checkpoint_that_does_not_fit_is_left_out(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = start(peft_model(), tmp_path)
    whole.train()
    path = tmp_path / "checkpoint-2" / "gelora" / "plan.json"
    dataclasses.replace(saved_plan(tmp_path), ranks=(9, 9, 9)).save(path)
    if damage == "no JSON":
        path.write_text("{")
    resumed = start(peft_model(), tmp_path / "out")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)
    assert "left out" in caplog.text
    assert "No plan lies beside it" in caplog.text
    assert not (tmp_path / "out" / "gelora").exists()


@pytest.mark.parametrize("missing", ["adapter_config.json", "the directory"])
def test_a_checkpoint_without_ranks_is_refused(tmp_path: Path, missing: str) -> None:
    start(peft_model(), tmp_path).train()
    path = tmp_path / "checkpoint-2"
    if missing == "the directory":
        shutil.rmtree(path)
    else:
        (path / missing).unlink()
    with pytest.raises(PlanError, match=r"checkpoint-2 has no adapter_config\.json"):
        start(peft_model(), tmp_path).train(resume_from_checkpoint=str(path))


def test_the_scaling_of_the_checkpoint_stays(tmp_path: Path) -> None:
    whole = start(peft_model(rank_pattern={"q_proj": 4}), tmp_path)
    whole.train()
    resumed = start(peft_model(rank_pattern={"q_proj": 4}, lora_alpha=32), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)


def test_another_kind_of_scaling_is_refused(tmp_path: Path) -> None:
    start(peft_model(), tmp_path).train()
    with pytest.raises(ApplyError, match=r"trained with use_rslora=False, and .* says True"):
        start(peft_model(use_rslora=True), tmp_path).train(resume_from_checkpoint=True)


def test_an_optimizer_of_the_users_is_refused_where_it_would_hold_the_old_matrices(tmp_path: Path) -> None:
    start(peft_model(), tmp_path).train()
    model = peft_model()
    optimizers = (torch.optim.Adagrad(model.parameters(), 0.1), None)
    with pytest.raises(TooLateError, match="optimizer_cls_and_kwargs"):
        start(model, tmp_path, optimizers=optimizers).train(resume_from_checkpoint=True)
    assert ranks_by_block(model) == [4, 4, 4]
