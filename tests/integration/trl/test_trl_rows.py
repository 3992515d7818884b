"""`gelora probe` measures what TRL trains on: the same token ids as its trainers make, in each of its formats."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from gelora_plugins.integrations.trl_rows import TrlRows
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from gelora_plugins import DimensionProfile, GeLoRACallback, GeLoRAConfig, RankPlan, cli
from gelora_plugins.errors import ProbeError
from gelora_plugins.probe.formats import TokenisedRows, are_for_trl
from tests.support.tiny import build

COUNT = 60
WORDS = ["river", "stone", "cloud", "ember", "field", "harbour", "lantern", "meadow", "orchard", "pepper", "quarry"]
CHAT = (
    "{{ bos_token }}{% if tools %}[tools]{% for t in tools %}{{ t['function']['name'] }} {% endfor %}{% endif %}"
    "{% if loud %}[loud]{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "cloud", "description": "", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Like Llama's: <s> before every text, which a chat template writes too, and no </s> after it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<unk>", "<s>", "</s>", "[user]", "[assistant]", "[system]", "[end]", "[tools]", "[loud]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=special[3:],
    )
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def model_path(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    build("llama", eos_token_id=2, pad_token_id=2, max_position_embeddings=256).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def data(kind: str) -> Dataset:
    rng = random.Random(0)

    def words(least: int = 3) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, 9)))

    rows = []
    for i in range(COUNT):
        ask, good, bad = words(), " " + words(), " " + words()
        asked, answer, worse = [turn("user", ask)], [turn("assistant", good)], [turn("assistant", bad)]
        row: dict[str, Any] = {
            "text": {"text": ask},
            "text that ends": {"text": f"{ask}</s>"},
            "messages": {"messages": [turn("system", bad), *asked, *answer, *asked, *answer]},
            "messages with tools": {"messages": [*asked, *answer], "tools": json.dumps([TOOL])},
            "messages with template options": {"messages": [*asked, *answer], "chat_template_kwargs": {"loud": True}},
            "ShareGPT": {"conversations": [{"from": "user", "value": ask}, {"from": "assistant", "value": good}]},
            "prompt-completion": {"prompt": ask, "completion": good},
            "chat prompt-completion": {"prompt": asked, "completion": answer},
            "preference": {"prompt": ask, "chosen": good, "rejected": bad},
            "preference, implicit prompt": {"chosen": ask + good, "rejected": ask + bad},
            "chat preference": {"prompt": asked, "chosen": answer, "rejected": worse},
            "chat preference, implicit prompt": {"chosen": asked + answer, "rejected": asked + worse},
            "unpaired": {"prompt": ask, "completion": good, "label": i % 2 == 0},
            "chat unpaired": {"prompt": asked, "completion": answer, "label": i % 2 == 0},
        }[kind]
        rows.append(row)
    return Dataset.from_list(rows)


FORMATS = {
    "text": (SFTTrainer, SFTConfig),
    "text that ends": (SFTTrainer, SFTConfig),
    "messages": (SFTTrainer, SFTConfig),
    "messages with tools": (SFTTrainer, SFTConfig),
    "messages with template options": (SFTTrainer, SFTConfig),
    "ShareGPT": (SFTTrainer, SFTConfig),
    "prompt-completion": (SFTTrainer, SFTConfig),
    "chat prompt-completion": (SFTTrainer, SFTConfig),
    "preference": (DPOTrainer, DPOConfig),
    "preference, implicit prompt": (DPOTrainer, DPOConfig),
    "chat preference": (DPOTrainer, DPOConfig),
    "chat preference, implicit prompt": (DPOTrainer, DPOConfig),
    "unpaired": (KTOTrainer, KTOConfig),
    "chat unpaired": (KTOTrainer, KTOConfig),
}


def trainer_of(kind: str, model_path: str, tokenizer: Any, directory: Path, **more: Any) -> Any:
    trainer, config = FORMATS[kind]
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": []}
    args = config(str(directory), use_cpu=True, bf16=False, **options)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return trainer(
        model_path, args=args, train_dataset=data(kind), processing_class=tokenizer, peft_config=lora, **more
    )


def trained_on(trainer: Any, i: int) -> list[int]:
    """The first sequence of the batch that the trainer makes of its row."""
    batch = trainer.data_collator([trainer.train_dataset[i]])
    return batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_token_ids_are_those_of_the_trainer(kind: str, model_path: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(kind, model_path, tokenizer, tmp_path)
    rows = TrlRows(data(kind), tokenizer, "text", 512)
    order = [7, 3, *range(20, COUNT)]
    assert [row["input_ids"] for row in rows.rows_at(order)] == [trained_on(trainer, i) for i in order]
    assert rows[5]["input_ids"] == trained_on(trainer, 5)
    assert len(rows) == COUNT
    assert rows[0]["input_ids"].count(1) == 1
    assert type(trainer).__name__ in rows.note


@pytest.mark.parametrize("kind", ["text", "messages with tools", "chat preference", "chat unpaired"])
def test_the_command_measures_what_the_callback_does(
    kind: str, model_path: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GeLoRAConfig(probe_samples=55)
    trainer = trainer_of(kind, model_path, tokenizer, tmp_path, callbacks=[GeLoRACallback(config)])
    trainer.train()
    there = RankPlan.load(tmp_path / "gelora" / "plan.json").profile
    here = probe(model_path, data(kind), tmp_path, monkeypatch, "--probe-samples", "55")
    assert here.data_fingerprint == there.data_fingerprint
    assert here.num_tokens == there.num_tokens


@pytest.mark.parametrize(("module", "name", "options"), [("orpo", "ORPO", {}), ("cpo", "CPO", {"loss_type": "simpo"})])
def test_pairs_of_orpo_and_simpo_are_the_prompt_with_the_chosen_answer(
    module: str, name: str, options: dict[str, Any], model_path: str, tokenizer: Any, tmp_path: Path
) -> None:
    home = importlib.import_module(f"trl.experimental.{module}")
    args = getattr(home, f"{name}Config")(
        str(tmp_path), max_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, **options
    )
    trainer = getattr(home, f"{name}Trainer")(
        AutoModelForCausalLM.from_pretrained(model_path),
        args=args,
        train_dataset=data("preference"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[GeLoRACallback(GeLoRAConfig(probe_max_length=9))],
    )
    trainer.train()
    profile = RankPlan.load(tmp_path / "gelora" / "plan.json").profile
    assert profile.num_documents == COUNT
    assert profile.num_tokens == sum(min(9, len(row["chosen_input_ids"])) for row in trainer.train_dataset)


def probe(model: str, dataset: Dataset, directory: Path, patch: pytest.MonkeyPatch, *options: str) -> DimensionProfile:
    dataset.to_json(directory / "rows.jsonl")
    output = directory / "profile.json"
    patch.setattr("sys.argv", ["gelora", "probe", model, str(directory / "rows.jsonl"), "-o", str(output), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    return DimensionProfile.from_dict(json.loads(output.read_text()))


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_prompts_are_read_as_grpo_reads_them(role: str, tokenizer: Any) -> None:
    chats = [[turn("user", "river stone")], [turn("user", "cloud"), turn(role, "ember field")]]
    rows = TrlRows(Dataset.from_list([{"prompt": chat, "answer": "cloud"} for chat in chats]), tokenizer, "text", 512)
    expected = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert [row["input_ids"] for row in rows.rows_at([0, 1])] == expected["input_ids"]
    plain = TrlRows(Dataset.from_list([{"prompt": "river stone"}]), tokenizer, "text", 512)
    assert plain[0]["input_ids"] == tokenizer("river stone")["input_ids"]
    assert "GRPOTrainer" in plain.note


def test_alpaca_is_a_prompt_with_its_completion(tokenizer: Any) -> None:
    source = [
        {"instruction": "river", "input": "", "output": "stone"},
        {"instruction": "cloud", "input": "ember", "output": "field"},
    ]
    rows = TrlRows(Dataset.from_list(source), tokenizer, "text", 512)
    assert [tokenizer.decode(row["input_ids"]).split() for row in rows.rows_at([0, 1])] == [
        ["<s>", "[user]", "river", "[end]", "[assistant]", "stone", "[end]"],
        ["<s>", "[user]", "cloud", "ember", "[end]", "[assistant]", "field", "[end]"],
    ]
    assert "put into a chat" in rows.note


class Letters:
    """A tokenizer without a chat template, whose tokens are letters."""

    chat_template = None
    eos_token = "|"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_alpaca_without_a_chat_template_is_its_own_prompt() -> None:
    source = [{"instruction": "A", "input": "", "output": "B"}, {"instruction": "A", "input": "C", "output": "B"}]
    rows = TrlRows(Dataset.from_list(source), Letters(), "text", 512)
    assert ["".join(map(chr, row["input_ids"])) for row in rows.rows_at([0, 1])] == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nA\n\n### Response:\nB|",
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nA\n\n### Input:\nC\n\n"
        "### Response:\nB|",
    ]
    assert "put into its prompt" in rows.note


def test_what_the_trainer_leaves_out_is_left_out() -> None:
    source = Dataset.from_list([{"prompt": "a" * 2000, "completion": "b"}, {"prompt": "a", "completion": "b"}])
    for max_length, lengths in ((512, [3]), (4096, [2002, 3])):
        rows = TrlRows(source, Letters(), "text", max_length)
        assert [len(row["input_ids"]) for row in rows.rows_at([0, 1])] == lengths


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("user", "a")], "images": ["a.png"]}, "The rows have images, and text only is read"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "several completions to a prompt"),
        ({"conversations": [turn("user", "a")]}, "SFTTrainer of trl .* cannot prepare .* fields conversations"),
        ({"prompt": "a", "completion": [turn("assistant", "b")]}, "cannot prepare .* fields prompt, completion"),
    ],
)
def test_what_trl_cannot_prepare_is_refused(row: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ProbeError, match=message):
        list(TrlRows(Dataset.from_list([row]), tokenizer, "text", 512).rows_at([0]))


def test_what_trl_is_needed_for() -> None:
    for names in (["messages"], ["conversations"], ["prompt", "x"], ["chosen", "rejected"], ["instruction", "output"]):
        assert are_for_trl(names, None, True)
        with pytest.raises(ProbeError, match=rf"^The rows have the fields {', '.join(names)}, .*gelora\[trl\]"):
            are_for_trl(names, None, False)
    for names in (["input_ids", "messages"], ["words"], ["text_a", "text_b"], ["instruction"]):
        assert not are_for_trl(names, "text", True)
        assert not are_for_trl(names, "text", False)
    assert [are_for_trl(["text"], field, trl) for field, trl in (("text", True), ("text", False), (None, True))] == [
        True,
        False,
        False,
    ]


def test_without_trl_text_is_what_the_tokenizer_makes_of_it(tokenizer: Any) -> None:
    rows = TokenisedRows(Dataset.from_list([{"words": "river stone"}]), tokenizer, "words")
    assert rows[0]["input_ids"] == tokenizer("river stone")["input_ids"]
