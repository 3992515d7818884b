"""GeLoRA in TRL with SmolLM2-135M: SFTTrainer, `gelora sft` as a process of its own, QLoRA, SIGKILL and resume."""

import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from gelora_plugins.integrations.trl import GeLoRASFTTrainer, main
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig

from gelora_plugins import GeLoRAConfig, RankPlan, select_ranks
from gelora_plugins.demo import passages, smollm2
from tests.support.forks import HANGS, run_script, start, wait

ROOT = Path(__file__).parents[2]
SAMPLES = 64
CLI = [sys.executable, "-m", "gelora_plugins.cli", "sft"]
LAUNCHED = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "gelora_plugins.integrations.trl"]
OPTIONS = {
    "max_steps": 3,
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}  # TRL's script says 0.05
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
GELORA = {"policy": "budget", "probe_samples": SAMPLES}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Passages of English prose, each cut in two: the first half asks, the second answers."""
    directory = tmp_path_factory.mktemp("data")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    ids = [row["input_ids"] for row in passages(tokenizer, SAMPLES + 8, length=32)]
    halves = [(tokenizer.decode(row[:16]), tokenizer.decode(row[16:])) for row in ids]
    rows = {
        "prompt-completion": [{"prompt": ask, "completion": answer} for ask, answer in halves],
        "chat": [{"messages": [user(ask), assistant(answer)]} for ask, answer in halves],
        "text": [{"text": ask + answer} for ask, answer in halves],
    }
    for kind, entries in rows.items():
        Dataset.from_list(entries).to_json(directory / f"{kind}.jsonl")
    return {kind: directory / f"{kind}.jsonl" for kind in rows}


def trainer_for(file: Path, directory: Path, quantization: Any = None, **options: Any) -> GeLoRASFTTrainer:
    return GeLoRASFTTrainer(
        smollm2(),
        args=SFTConfig(str(directory), **{**OPTIONS, "disable_tqdm": True, **options}),
        train_dataset=load_dataset("json", data_files=str(file), split="train"),
        quantization_config=quantization,
        peft_config=LoraConfig(**LORA),
        gelora=GeLoRAConfig(**GELORA),
    )


@pytest.fixture(scope="module")
def script(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains on rows of a kind in this process, once for all tests; the directory of what it saved."""

    @functools.cache
    def trained(kind: str) -> Path:
        directory = tmp_path_factory.mktemp("script")
        trainer = trainer_for(files[kind], directory, **SAVING)
        trainer.train()
        trainer.save_model()
        return directory

    return trained


def sft_options(file: Path, directory: Path, **options: Any) -> list[str]:
    """What `trainer_for` has, on the command line."""
    lora = {"use_peft": True, **{f"lora_{name.removeprefix('lora_')}": value for name, value in LORA.items()}}
    given = {"model_name_or_path": smollm2(), "dataset_name": file, "output_dir": directory, "dtype": "float32"}
    everything = {**given, **OPTIONS, **lora, **GELORA, **options}
    return [str(part) for name, value in everything.items() for part in (f"--{name}", value)]


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_forked(function: Callable[..., None], *arguments: Any, log: Path) -> str:
    """What the function says in a process of its own, which has not to import all again."""
    assert wait(start(function, *arguments, log=log)) == 0, log.read_text()
    return log.read_text()


def plan_of(directory: Path) -> RankPlan:
    return RankPlan.load(directory / "gelora" / "plan.json")


def ranks_in(adapter: Path) -> dict[str, int]:
    """The rank of each module as its tensors have it."""
    ranks: dict[str, int] = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        assert ranks.setdefault(module, tensor.shape["AB".index(kind[0])]) == tensor.shape["AB".index(kind[0])]
    return ranks


def check_ranks(adapter: Path, plan: RankPlan) -> None:
    found = ranks_in(adapter)
    assert len(found) == 7 * len(plan.sites) == 7 * 30
    assert len(set(plan.ranks)) > 1
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        assert {r for module, r in found.items() if module.startswith(f"{site.name}.")} == {rank}


def check_same(one: RankPlan, other: RankPlan) -> None:
    """The plans of two measurements of the same documents.

    Processes may use another number of threads, and so round otherwise: a dimension by some 1e-6. Of 30 shares of a
    budget one can be that near to an edge; a rank of one block then goes to another.
    """
    assert one.profile.data_fingerprint == other.profile.data_fingerprint
    for mine, theirs in zip(one.profile.estimates, other.profile.estimates, strict=True):
        assert mine.value == pytest.approx(theirs.value, rel=1e-4)
    assert sum(one.ranks) == sum(other.ranks)
    assert max(abs(mine - theirs) for mine, theirs in zip(one.ranks, other.ranks, strict=True)) <= 1


def losses(checkpoint: Path) -> dict[int, float]:
    """Training loss by step."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.parametrize(("kind", "command"), [("prompt-completion", CLI), ("chat", LAUNCHED)], ids=["cli", "launched"])
def test_script_and_command_save_the_same_planned_ranks(
    kind: str, command: list[str], files: dict[str, Path], script: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two runs, one in this process and one of `gelora sft`, with one seed."""
    plan = plan_of(script(kind))
    check_ranks(script(kind), plan)

    output = run([*command, *sft_options(files[kind], tmp_path / "command", max_steps=1)])
    assert "LoRA ranks by GeLoRA" in output
    again = plan_of(tmp_path / "command")
    check_ranks(tmp_path / "command", again)
    check_same(again, plan)


def test_killed_run_resumes_with_its_ranks(
    files: dict[str, Path], script: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = script("chat")
    checkpoint = tmp_path / "killed" / "checkpoint-2"
    options = sft_options(files["chat"], tmp_path / "killed", **{**SAVING, "max_steps": 100})
    process = start(main, options, log=tmp_path / "log.txt")
    deadline = time.monotonic() + HANGS
    while not is_json(checkpoint / "trainer_state.json"):
        assert process.is_alive(), "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert wait(process) == -signal.SIGKILL
    plan_file = tmp_path / "killed" / "gelora" / "plan.json"
    written, plan = plan_file.stat().st_mtime_ns, plan_of(tmp_path / "killed")
    check_ranks(checkpoint, plan)

    options = sft_options(files["chat"], tmp_path / "killed", **SAVING, resume_from_checkpoint=checkpoint)
    output = run_forked(main, options, log=tmp_path / "log of the second.txt")
    assert "restored the ranks of the checkpoint" in output
    assert "GeLoRA probe" not in output
    assert plan_file.stat().st_mtime_ns == written
    check_ranks(tmp_path / "killed" / "checkpoint-4", plan)
    check_same(plan, plan_of(whole))
    expected, found = losses(whole / "checkpoint-4"), losses(tmp_path / "killed" / "checkpoint-4")
    assert list(found) == list(expected) == [1, 2, 3, 4]
    # Four steps of 1e-3: they go as far astray as their gradients round, and that is less than the tolerance by far.
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-3)


def is_json(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def test_packed_documents_have_the_profile_of_unpacked_ones(files: dict[str, Path], tmp_path: Path) -> None:
    config = GeLoRAConfig(probe_samples=SAMPLES + 8)
    profiles = {}
    for name, options in {"unpacked": {}, "packed": {"packing": True, "max_length": 128}}.items():
        trainer = trainer_for(files["text"], tmp_path / name, **options)
        assert (len(trainer.train_dataset) < SAMPLES / 2) == (name == "packed")
        profiles[name] = select_ranks(trainer.model, trainer.train_dataset, config, progress=False).profile
    packed, unpacked = profiles["packed"], profiles["unpacked"]
    assert packed.num_documents == unpacked.num_documents == SAMPLES + 8
    assert packed.num_tokens == unpacked.num_tokens
    for one, other in zip(packed.estimates, unpacked.estimates, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-3)


def test_qlora_keeps_dtype_and_base_and_moves_every_matrix(files: dict[str, Path], tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    trainer = trainer_for(files["prompt-completion"], tmp_path, quantization)
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if ".lora_" in name}
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    assert set(dtypes.values()) == {torch.bfloat16}  # trl 1.16 makes it so for quantised models
    assert len(base) == 210
    start: dict[str, torch.Tensor] = {}
    make_optimizer = trainer.create_optimizer

    def remember(*args: Any, **kwargs: Any) -> Any:
        start.update({name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".lora_" in name})
        return make_optimizer(*args, **kwargs)

    trainer.create_optimizer = remember  # by then the ranks are as planned, and nothing has been trained
    trainer.train()
    trainer.save_model()
    check_ranks(tmp_path, plan_of(tmp_path))
    after = dict(trainer.model.named_parameters())
    assert {name: after[name].dtype for name in dtypes} == dtypes
    assert len(start) == 420
    assert not [name for name, tensor in start.items() if torch.equal(tensor, after[name])]
    assert not [name for name, tensor in base.items() if not torch.equal(tensor, after[name])]


@pytest.mark.parametrize("example", ["trl_sft.py", "trainer.py"])
def test_example_runs(example: str, files: dict[str, Path], tmp_path: Path) -> None:
    own = ["--data", str(files["text"])] if example == "trainer.py" else []
    options = ["--output", str(tmp_path), "--samples", str(SAMPLES), "--steps", "2", *own]
    run_forked(run_script, ROOT / "examples" / example, options, log=tmp_path / "log.txt")
    check_ranks(tmp_path, plan_of(tmp_path))
