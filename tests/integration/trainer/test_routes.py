"""Every route to a training ends with our own check: the adapter has the plan's ranks, the optimizer all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from gelora_plugins.integrations import trainer_check
from gelora_plugins.integrations.trl import GeLoRASFTTrainer
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig, prepare_trainer, with_plan
from gelora_plugins.ranks.plan import RankPlan
from tests.support.plans import plan_for
from tests.support.tiny import VOCABULARY, build
from tests.support.training import LORA, arguments, ranks_by_block, rows, trainer_for

RANKS = (2, 6, 5)


def lora() -> LoraConfig:
    return LoraConfig(**LORA)


def callback(directory: Path, **options: Any) -> GeLoRACallback:
    return GeLoRACallback(plan=str(directory / "plan.json"), **options)


def in_place(directory: Path) -> Trainer:
    return trainer_for(get_peft_model(build("llama"), lora()), directory, callback(directory))


def add_adapter(directory: Path) -> Trainer:
    model = build("llama")
    model.add_adapter(lora())
    return trainer_for(model, directory, callback(directory))


def lora_config(directory: Path) -> Trainer:
    return trainer_for(build("llama"), directory, callback(directory, lora_config=lora()))


def own_adapter(directory: Path) -> Trainer:
    plan = RankPlan.load(directory / "plan.json")
    model = build("llama")
    return trainer_for(get_peft_model(model, with_plan(lora(), plan, model)), directory, callback(directory))


def prepared(directory: Path) -> Trainer:
    """As Axolotl's plugin does it."""
    trainer = trainer_for(get_peft_model(build("llama"), lora()), directory, None)
    prepare_trainer(trainer, GeLoRAConfig(plan=str(directory / "plan.json")))
    return trainer


def sft(directory: Path, trainer: type[SFTTrainer], **options: Any) -> Trainer:
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="3", pad_token="0", eos_token="2")
    args = SFTConfig(**{**arguments(directory).to_dict(), "output_dir": str(directory)})
    made: Trainer = trainer(
        model=build("llama"),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(20)]),
        processing_class=tokenizer,
        peft_config=lora(),
        **options,
    )
    return made


def trl_callback(directory: Path) -> Trainer:
    return sft(directory, SFTTrainer, callbacks=[callback(directory)])


def trl_trainer(directory: Path) -> Trainer:
    return sft(directory, GeLoRASFTTrainer, gelora=GeLoRAConfig(plan=str(directory / "plan.json")))


def resumed(directory: Path) -> Trainer:
    first = trainer_for(get_peft_model(build("llama"), lora()), directory, callback(directory), save_strategy="epoch")
    first.train()
    return trainer_for(get_peft_model(build("llama"), lora()), directory, GeLoRACallback(), max_steps=4)


ROUTES = [in_place, add_adapter, lora_config, own_adapter, prepared, trl_callback, trl_trainer, resumed]


@pytest.mark.parametrize("route", ROUTES)
def test_the_adapter_and_the_optimizer_are_checked_at_the_first_step(
    tmp_path: Path, route: Callable[[Path], Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)  # half the time
    plan = plan_for(build("llama"), RANKS, lora())
    plan.save(tmp_path / "plan.json")
    trainer = route(tmp_path)
    seen: list[str] = []

    def watched(name: str) -> None:
        original = getattr(trainer_check, name)

        def check(first: Any, second: Any) -> None:
            original(first, second)
            assert first in (trainer.model, trainer.optimizer)
            assert trainer.state.global_step in (0, 3)
            seen.append(name)

        monkeypatch.setattr(trainer_check, name, check)

    watched("check_plan")
    watched("check_held")
    trainer.train(resume_from_checkpoint=route is resumed)
    assert seen == ["check_plan", "check_held"]
    assert ranks_by_block(trainer.model) == list(RANKS)
