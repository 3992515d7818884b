"""GeLoRA in the trainers of TRL, on a tiny random Llama with SmolLM2's tokenizer."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from gelora_plugins.integrations.trl import GeLoRASFTTrainer, main, make_parser
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.scripts import sft

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan, hookimpl, select_ranks
from gelora_plugins.demo import smollm2
from gelora_plugins.errors import ApplyError, ConfigError, GeLoRAError, ProbeError
from gelora_plugins.plugins import plugin_manager
from tests.support.tiny import BLOCKS, build

DOCUMENTS = 60
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
RANKS = (2, 5, 3)  # below and above r: what random models measure would be one rank everywhere
GELORA = GeLoRAConfig(probe_samples=DOCUMENTS, policy="fixed")
WORDS = ["river", "stone", "cloud", "ember", "field", "harbour", "lantern", "meadow", "orchard", "pepper", "quarry"]
# The training template of SmolLM2 is not among those that trl 1.16 knows, and its own has no generation markers.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class FixedRanks:
    @hookimpl
    def register_rank_policies(self) -> dict[str, Any]:
        return {"fixed": lambda profile, sites, base_rank, config: RANKS}


@pytest.fixture(scope="module", autouse=True)
def fixed_policy() -> Iterator[None]:
    plugin = FixedRanks()
    plugin_manager().register(plugin, "fixed ranks")
    yield
    plugin_manager().unregister(plugin)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def model_path(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    build(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))


def data(kind: str, count: int = DOCUMENTS) -> Dataset:
    rng = random.Random(0)

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    def assistant(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    rows = []
    for _ in range(count):
        ask, good, bad = sentence(rng), " " + sentence(rng), " " + sentence(rng)
        rows.append(
            {
                "text": {"text": ask},
                "prompt-completion": {"prompt": ask, "completion": good},
                "chat": {"messages": [user(ask), assistant(good)]},
                "chat prompt-completion": {"prompt": [user(ask)], "completion": [assistant(good)]},
                "preference": {"prompt": ask, "chosen": good, "rejected": bad},
                "chat preference": {"prompt": [user(ask)], "chosen": [assistant(good)], "rejected": [assistant(bad)]},
                "unpaired": {"prompt": ask, "completion": good, "label": len(rows) % 2 == 0},
                "prompt": {"prompt": ask},
            }[kind]
        )
    return Dataset.from_list(rows)


def arguments(config_class: Any, directory: Path, **options: Any) -> Any:
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,  # each matrix is seen to move; where to is no matter
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return config_class(str(directory), **{**defaults, **options})


def plan_of(directory: Path) -> RankPlan:
    return RankPlan.load(directory / "gelora" / "plan.json")


def check_saved(adapter: Path, plan: RankPlan) -> None:
    """Every matrix in the saved file has its block's planned rank, and was moved by the training."""
    tensors = {name: t for name, t in load_file(adapter / "adapter_model.safetensors").items() if ".lora_" in name}
    assert len(tensors) == BLOCKS * 7 * 2
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        for name, tensor in tensors.items():
            if f".{site.name}." in name:
                assert tensor.shape[0 if ".lora_A." in name else 1] == rank, name
                assert tensor.any(), name


SFT_CASES = {
    "text": ("text", {}),
    "prompt-completion": ("prompt-completion", {}),
    "loss on the prompt too": ("prompt-completion", {"completion_only_loss": False}),
    "chat": ("chat", {}),
    "chat prompt-completion": ("chat prompt-completion", {}),
    "assistant masks": ("chat", {"assistant_only_loss": True}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
    "packed bfd": ("text", {"packing": True, "max_length": 48}),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_trains_and_saves_the_planned_ranks(case: str, model_path: str, tmp_path: Path) -> None:
    kind, options = SFT_CASES[case]
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, tmp_path, **options),
        train_dataset=data(kind),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    trainer.train()
    trainer.save_model()
    plan = plan_of(tmp_path)
    assert plan.profile.num_documents == DOCUMENTS
    assert plan.ranks == RANKS
    check_saved(tmp_path, plan)


def profile_of(model_path: str, directory: Path, **options: Any) -> Any:
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, directory, max_steps=1, **options),
        train_dataset=data("text"),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    trainer.train()
    return trainer, plan_of(directory).profile


def test_packed_documents_are_points_of_their_own(model_path: str, tmp_path: Path) -> None:
    _, unpacked = profile_of(model_path, tmp_path / "unpacked", max_length=48)
    for name, options in {
        "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 48},
        "padding-free": {"padding_free": True, "max_length": None},
    }.items():
        trainer, profile = profile_of(model_path, tmp_path / name, **options)
        assert (len(trainer.train_dataset) < DOCUMENTS / 2) == (name == "bfd")
        assert profile.num_documents == unpacked.num_documents == DOCUMENTS
        assert profile.num_tokens == unpacked.num_tokens
        for one, other in zip(profile.estimates, unpacked.estimates, strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-3)


def test_wrapped_packing_counts_rows_and_says_so(
    model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 8}
    trainer, profile = profile_of(model_path, tmp_path, **options)
    assert profile.num_documents == min(DOCUMENTS, len(trainer.train_dataset))
    assert "Each packed row counts as one document" in caplog.text


def test_callback_and_drop_in_choose_the_same_ranks(model_path: str, tmp_path: Path) -> None:
    tensors = {}
    for name in ("callback", "drop-in"):
        args = arguments(SFTConfig, tmp_path / name)
        common = {"args": args, "train_dataset": data("text"), "peft_config": LoraConfig(**LORA)}
        trainer = (
            SFTTrainer(model_path, callbacks=[GeLoRACallback(GELORA)], **common)
            if name == "callback"
            else GeLoRASFTTrainer(model_path, gelora=GELORA, **common)
        )
        trainer.train()
        trainer.save_model()
        tensors[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert plan_of(tmp_path / "callback").ranks == plan_of(tmp_path / "drop-in").ranks
    assert tensors["callback"].keys() == tensors["drop-in"].keys()
    # Both do the same operations in the same order.
    for name, tensor in tensors["callback"].items():
        torch.testing.assert_close(tensor, tensors["drop-in"][name], rtol=0, atol=0)


def test_drop_in_and_callback_together_are_refused(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given a GeLoRACallback as well"):
        GeLoRASFTTrainer(
            model_path,
            args=arguments(SFTConfig, tmp_path),
            train_dataset=data("text"),
            peft_config=LoraConfig(**LORA),
            callbacks=[GeLoRACallback()],
        )


def test_drop_in_without_an_adapter_is_an_error(model_path: str, tmp_path: Path) -> None:
    trainer = GeLoRASFTTrainer(model_path, args=arguments(SFTConfig, tmp_path), train_dataset=data("text"))
    with pytest.raises(ApplyError, match="no LoRA adapter"):
        trainer.train()


def test_streamed_rows(model_path: str, tmp_path: Path) -> None:
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, tmp_path),
        train_dataset=data("text").to_iterable_dataset(),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    trainer.train()
    assert plan_of(tmp_path).profile.num_documents == DOCUMENTS


def test_four_bit_adapter_keeps_the_dtype_that_trl_gave_it(model_path: str, tmp_path: Path) -> None:
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, tmp_path),
        train_dataset=data("text"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    before = {name: p.dtype for name, p in trainer.model.named_parameters() if ".lora_" in name}
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    trainer.train()
    assert {name: p.dtype for name, p in trainer.model.named_parameters() if ".lora_" in name} == before
    assert set(before.values()) == {torch.bfloat16}
    assert len(base) == BLOCKS * 7
    for name, p in trainer.model.named_parameters():
        assert name not in base or torch.equal(p, base[name])  # bitsandbytes repacks them when it is left to
    trainer.save_model()
    check_saved(tmp_path, plan_of(tmp_path))


# Preference trainers. What each row must count as is written out here, from the columns that the trainer made.
PREFERENCE_CASES = {
    "dpo": (DPOTrainer, DPOConfig, "preference", ("prompt_ids", "chosen_ids")),
    "dpo chat": (DPOTrainer, DPOConfig, "chat preference", ("prompt_ids", "chosen_ids")),
    "dpo streamed": (DPOTrainer, DPOConfig, "preference", ("prompt_ids", "chosen_ids")),
    "kto": (KTOTrainer, KTOConfig, "unpaired", ("prompt_ids", "completion_ids")),
    "reward": (RewardTrainer, RewardConfig, "preference", ("chosen_ids",)),
}


@pytest.mark.parametrize("case", PREFERENCE_CASES)
def test_preference_rows_are_one_document_each(case: str, model_path: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer_class, config_class, kind, columns = PREFERENCE_CASES[case]
    dataset = data(kind)
    lora = LoraConfig(**LORA)
    model: Any = model_path
    if case == "reward":
        lora = LoraConfig(**LORA, task_type="SEQ_CLS")
        model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    trainer = trainer_class(
        model,
        args=arguments(config_class, tmp_path, max_length=64),
        train_dataset=dataset.to_iterable_dataset() if "streamed" in case else dataset,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[GeLoRACallback(GELORA)],
    )
    rows = [{"input_ids": [token for name in columns for token in row[name]]} for row in trainer.train_dataset]
    # A stream is sampled in another way than a list.
    expected = select_ranks(trainer.model, iter(rows) if "streamed" in case else rows, GELORA, progress=False)
    trainer.train()
    trainer.save_model()
    plan = plan_of(tmp_path)
    assert plan.profile.num_documents == DOCUMENTS
    assert plan.profile.data_fingerprint == expected.profile.data_fingerprint
    assert plan.profile.estimates == expected.profile.estimates
    assert plan.ranks == RANKS
    check_saved(tmp_path, plan)


def dpo_with_reference(model_path: str, tokenizer: Any, directory: Path, **options: Any) -> DPOTrainer:
    """A DPO trainer that is given a PeftModel adds a copy of its adapter, "ref", with the same configuration object."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path)
    return DPOTrainer(
        get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")),
        args=arguments(DPOConfig, directory, max_length=64, **options),
        train_dataset=data("preference"),
        processing_class=tokenizer,
        callbacks=[GeLoRACallback(GELORA)],
    )


def shapes(model: PeftModel, adapter: str) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if f".{adapter}." in name}


def test_dpo_reference_adapter_is_left_alone_and_resumes(model_path: str, tokenizer: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = dpo_with_reference(model_path, tokenizer, tmp_path, max_steps=4, **saving)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    reference = {name: p.clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    trainer.train()
    plan = plan_of(tmp_path)
    check_saved(tmp_path / "checkpoint-2", plan)
    assert not trainer.model.peft_config["ref"].rank_pattern
    for name, p in trainer.model.named_parameters():
        if ".ref." in name:
            torch.testing.assert_close(p, reference[name], rtol=0, atol=0)
            assert not p.requires_grad
    written = (tmp_path / "gelora" / "plan.json").read_bytes()

    resumed = dpo_with_reference(model_path, tokenizer, tmp_path, max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "gelora" / "plan.json").read_bytes() == written
    assert shapes(resumed.model, "default") == shapes(trainer.model, "default")
    # The steps after the checkpoint are the same operations in the same order.
    for (name, p), (_, q) in zip(trainer.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        if ".default." in name:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_with_prompts_only_need_a_plan(
    trainer_class: Any, config_class: Any, model_path: str, tokenizer: Any, tmp_path: Path
) -> None:
    def made(callback: GeLoRACallback) -> Any:
        options = {"num_generations": 2, "max_completion_length": 4}
        return trainer_class(
            model_path,
            reward_funcs=reward,
            args=arguments(config_class, tmp_path / "run", **options),
            train_dataset=data("prompt"),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            callbacks=[callback],
        )

    with pytest.raises(ProbeError, match=r"has prompts only \(prompt\).*plan='plan.json'"):
        made(GeLoRACallback(GELORA)).train()

    rows = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in data("text")]
    base = AutoModelForCausalLM.from_pretrained(model_path)
    plan = select_ranks(base, rows, GELORA, lora_config=LoraConfig(**LORA), progress=False)
    plan.save(tmp_path / "plan.json")
    trainer = made(GeLoRACallback(plan=str(tmp_path / "plan.json")))
    trainer.train()
    trainer.save_model()
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        assert {t.shape[0] for name, t in tensors.items() if f".{site.name}." in name and ".lora_A." in name} == {rank}


# gelora sft, in this process; tests/e2e/test_trl_smollm2.py runs it as a command.
def options_for(model_path: str, directory: Path, dataset: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": model_path,
        "output_dir": str(directory),
        "dataset_name": str(dataset),
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": "all-linear",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "probe_samples": DOCUMENTS,
        "policy": "fixed",
    }


def flags(options: dict[str, Any]) -> list[str]:
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture
def options(model_path: str, tmp_path: Path) -> dict[str, Any]:
    data("prompt-completion").to_json(tmp_path / "data.jsonl")
    return options_for(model_path, tmp_path / "run", tmp_path / "data.jsonl")


def test_sft_command_takes_flags_and_yaml(options: dict[str, Any], tmp_path: Path) -> None:
    before = sft.main, SFTTrainer
    main(flags(options))
    plan = plan_of(tmp_path / "run")
    check_saved(tmp_path / "run", plan)
    assert (plan.policy, plan.profile.num_documents) == ("fixed", DOCUMENTS)
    check = {**options, "output_dir": str(tmp_path / "again")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(check))
    main(["--config", str(tmp_path / "run.yaml"), "--policy", "gelora"])
    assert plan_of(tmp_path / "again").policy == "gelora"
    assert (sft.main, trl.SFTTrainer) == before


def test_sft_command_in_two_processes(options: dict[str, Any], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launch, "-m", "gelora_plugins.integrations.trl", *flags({**options, "policy": "gelora"})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("LoRA ranks by GeLoRA") == 1
    assert torch.load(tmp_path / "run" / "training_args.bin", weights_only=False).world_size == 2
    plan = plan_of(tmp_path / "run")
    assert set(plan.ranks) != {LORA["r"]}
    check_saved(tmp_path / "run", plan)


def test_sft_command_takes_a_mixture_of_datasets(options: dict[str, Any], tmp_path: Path) -> None:
    source = {"path": "json", "data_files": options.pop("dataset_name")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**options, "datasets": [source]}))
    main(["--config", str(tmp_path / "run.yaml")])
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == plan_of(tmp_path / "run").rank_pattern()


def test_sft_command_refuses_what_it_would_ignore(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**options, "probe_sample": 64}))
    with pytest.raises(ValueError, match="probe_sample"):
        main(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ConfigError, match="Add --use_peft"):
        main(flags({**options, "use_peft": False}))
    with pytest.raises(ConfigError, match="on_failure is 'ignore'"):
        main(flags({**options, "on_failure": "ignore"}))
    with pytest.raises(ConfigError, match="budgte"):
        main(flags({**options, "policy": "budgte"}))


def test_the_help_of_the_sft_command_begins_with_our_options() -> None:
    text = make_parser().format_help()
    ours = [text.index(f"--{field.name} ") for field in fields(GeLoRAConfig)]
    assert ours == sorted(ours)
    assert text.index("options:") < ours[0] < ours[-1] < text.index("--per_device_train_batch_size ")
    assert text.index("\n\n") < 200  # the usage, which named every option


def test_sft_command_names_a_file_that_cannot_be_read(options: dict[str, Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ProbeError, match=r"broken\.jsonl cannot be read as json"):
        main(flags({**options, "dataset_name": str(broken)}))


def test_another_sft_script_is_not_run_without_gelora(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "main", lambda *arguments: pytest.fail("the script was run"))
    with pytest.raises(GeLoRAError, match=r"examples/trl_sft\.py"):
        main(flags(options))
