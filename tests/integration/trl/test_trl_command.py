"""`gelora sft`, in this process; tests/e2e/test_trl_smollm2.py runs it as a command."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from gelora_plugins.integrations.trl import main, make_parser
from trl import SFTTrainer
from trl.scripts import sft

from gelora_plugins import GeLoRAConfig
from gelora_plugins.errors import ConfigError, GeLoRAError, ProbeError
from tests.support.forks import run_together, said
from tests.support.groups import sft_command
from tests.support.trl_runs import DOCUMENTS, LORA, check_saved, data, plan_of

pytestmark = pytest.mark.usefixtures("fixed_policy")


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
    assert run_together(tmp_path, 2, sft_command, flags({**options, "policy": "gelora"})) == [0, 0], said(
        tmp_path
    ).read_text()
    assert [said(tmp_path, i).read_text().count("LoRA ranks by GeLoRA") for i in (0, 1)] == [1, 0]
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
