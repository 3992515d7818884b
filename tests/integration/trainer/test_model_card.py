"""README.md beside an adapter: what PEFT, the Trainer and TRL wrote stays, and the ranks are told once."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from gelora_plugins.integrations.model_card import BEGIN, complete_card
from gelora_plugins.integrations.trl import GeLoRASFTTrainer
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import Trainer
from trl import SFTConfig

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from tests.support.letters import tokenizer
from tests.support.plans import make_plan, plan_for
from tests.support.tiny import build
from tests.support.training import LORA, layers, peft_model, rows, trainer_for


class Hub:
    """Takes what is uploaded: the files there, and the card as it is then."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.card = ""

    def upload_folder(self, *, folder_path: str, **options: Any) -> None:
        directory = Path(folder_path)
        self.files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
        self.card = (directory / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: stub)
    return stub


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA)).save(tmp_path / "plan.json")
    return trainer_for(peft_model(), tmp_path / "out", GeLoRACallback(plan=str(tmp_path / "plan.json")))


def check_told_once(text: str) -> None:
    card = ModelCard(text)
    assert card.data.tags is not None
    assert card.data.tags.count("gelora") == 1
    assert text.count("## LoRA ranks") == text.count(BEGIN) == 1
    assert "first to the last: 2, 6, 5. " in text


def test_a_saved_adapter_has_the_tag_and_the_section_beside_pefts(tmp_path: Path, trainer: Trainer) -> None:
    trainer.train()
    for _ in range(2):
        trainer.save_model(str(tmp_path / "adapter"))
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    check_told_once(text)
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert "### Framework versions" in text
    assert "ranks.png" not in text  # which is where the report is


def test_an_upload_has_the_picture_that_the_card_shows(trainer: Trainer, hub: Hub) -> None:
    trainer.train()
    trainer.hub_model_id = "me/adapter"
    for _ in range(2):
        trainer.push_to_hub()
        check_told_once(hub.card)
        shown = re.findall(r"\]\((gelora/[^)]+)\)", hub.card)
        assert shown == ["gelora/ranks.png", "gelora/report.html"]
        assert {*shown, "gelora/plan.json", "adapter_model.safetensors"} <= hub.files
        assert "## Training procedure" in hub.card  # of the Trainer's card


def test_trls_card_keeps_what_it_says(tmp_path: Path, hub: Hub) -> None:
    plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA)).save(tmp_path / "plan.json")
    args = SFTConfig(
        str(tmp_path / "out"), max_steps=1, bf16=False, use_cpu=True, report_to=[], save_steps=1, logging_steps=1
    )
    trainer = GeLoRASFTTrainer(
        build("llama"),
        args=args,
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
        gelora=GeLoRAConfig(plan=str(tmp_path / "plan.json")),
    )
    trainer.train()
    trainer.hub_model_id = "me/adapter"
    trainer.push_to_hub()
    check_told_once(hub.card)
    assert {"sft", "trl"} <= {*ModelCard(hub.card).data.tags}
    assert "This model was trained with SFT" in hub.card
    check_told_once((tmp_path / "out" / "checkpoint-1" / "README.md").read_text(encoding="utf-8"))


def test_an_adapter_with_ranks_of_ones_own_has_its_card_as_it_is(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, None)
    trainer.train()
    trainer.save_model()
    assert "gelora" not in (tmp_path / "README.md").read_text(encoding="utf-8")


BROKEN = {
    "metadata": b"---\ntags: [\n---\nMine.\n",
    "bytes": b"\xff\xfe---\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_card_that_cannot_be_read_is_a_warning_and_stays(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(BROKEN[kind])
    with caplog.at_level(logging.WARNING):
        complete_card(tmp_path, make_plan())
    assert f"{path} was not completed with the ranks: " in caplog.text
    assert path.read_bytes() == BROKEN[kind]


@pytest.mark.parametrize(
    "text",
    [
        "Mine.\n",
        "---\ntags: mine\n---\n# Mine\n",
        "---\nlicense: mit\ntags:\n- a\n---\nMine.\n\n\n",
        "---\n---\n# A\r\nB\r\n",
    ],
)
def test_a_users_own_card_keeps_its_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    complete_card(tmp_path, make_plan())
    once = path.read_bytes().decode()
    assert ModelCard(text).text.strip() in once
    assert {*ModelCard(text).data.to_dict()} | {"tags"} == {*ModelCard(once).data.to_dict()}
    complete_card(tmp_path, make_plan())
    assert path.read_bytes().decode() == once


def test_the_section_goes_where_the_ranks_are_no_longer_the_plans(tmp_path: Path, trainer: Trainer) -> None:
    """As at the end of a method that takes ranks out."""
    trainer.train()
    trainer.save_model()
    check_told_once((tmp_path / "out" / "README.md").read_text(encoding="utf-8"))
    next(iter(layers(trainer.model).values())).r["default"] = 1
    trainer.save_model()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## LoRA ranks" not in text
    assert "### Framework versions" in text


def test_where_there_is_no_card_none_is_made(tmp_path: Path) -> None:
    complete_card(tmp_path, make_plan())
    assert list(tmp_path.iterdir()) == []
