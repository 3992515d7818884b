"""Real `axolotl` commands in processes of their own, and what they leave behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from gelora_plugins.ranks.plan import RankPlan

AXOLOTL = tuple(int(part) for part in version("axolotl").split(".")[:2])
HAS_ENTRY_POINTS = AXOLOTL >= (0, 21)  # the group axolotl.plugins, which `plugins: [gelora]` needs
DOTTED = "gelora_plugins.GeLoRAPlugin"
PLUGIN = "gelora" if HAS_ENTRY_POINTS else DOTTED
ROOT = Path(__file__).parents[2]
TIMEOUT = 1200
ENVIRONMENT = {
    **os.environ,
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",  # threads that spin make a machine with other work many times slower
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # of `accelerate`
}


@dataclass(frozen=True)
class Run:
    """A command that has ended."""

    returncode: int
    log: str
    output_dir: Path

    @property
    def losses(self):
        """The logged training losses by step, from the last checkpoint."""
        checkpoints = sorted(self.output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        history = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    @property
    def plan(self):
        """The plan that the plugin wrote."""
        return RankPlan.load(self.output_dir / "gelora" / "plan.json")


def command(*arguments, cwd, output_dir=None, env=None):
    """`axolotl ARGUMENTS` in `cwd`."""
    ended = subprocess.run(
        [Path(sys.executable).with_name("axolotl"), *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return Run(ended.returncode, ended.stdout, output_dir)


class Workplace:
    """A directory with a model, data, and one small configuration to vary."""

    def __init__(self, directory, model):
        self.directory = directory
        self.model = model

    def write(self, name, **changes):
        """Write NAME.yml; a change to None removes the key. The output directory is NAME."""
        config = {
            "base_model": str(self.model),
            "plugins": [PLUGIN],
            "gelora": {"policy": "budget", "probe_samples": 96},
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
            "lora_mlp_kernel": False,
            "lora_qkv_kernel": False,
            "lora_o_kernel": False,
            "bf16": False,
            "datasets": [{"path": "prose.jsonl", "ds_type": "json", "type": "completion"}],
            "dataset_prepared_path": "prepared",
            "dataset_num_proc": 1,
            "sequence_len": 64,
            "special_tokens": {"pad_token": "<|im_end|>"},
            "output_dir": name,
            "max_steps": 2,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.001,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "logging_steps": 1,
            "save_steps": 100,
            "seed": 42,
            **changes,
        }
        path = self.directory / f"{name}.yml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return path

    def train(self, name, *, env=None, launcher="python", **changes):
        """`axolotl train` of the small configuration with `changes`."""
        path = self.write(name, **changes)
        output_dir = self.directory / (changes.get("output_dir") or name)
        return command("train", path, "--launcher", launcher, cwd=self.directory, output_dir=output_dir, env=env)

    def train_until_killed(self, name, step, **changes):
        """The same, ended by SIGKILL when `step` is done."""
        path = self.write(name, **changes)
        log = self.directory / f"{name}.log"
        done = re.compile(rf"\b{step}/{changes['max_steps']} \[")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("axolotl"), "train", path, "--launcher", "python"],
                cwd=self.directory,
                env=ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            started = time.monotonic()
            while process.poll() is None and not done.search(log.read_text(errors="replace")):
                assert time.monotonic() - started < TIMEOUT, log.read_text(errors="replace")
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
        return Run(process.returncode, log.read_text(errors="replace"), self.directory / name)


def adapter_ranks(directory):
    """Rank of every adapted module, read from the shapes of the saved tensors."""
    from safetensors import safe_open

    ranks = {}
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            module, kind = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", key).groups()
            rank = file.get_slice(key).get_shape()[0 if kind == "A" else 1]
            assert ranks.setdefault(module, rank) == rank, key
    return ranks


def check_ranks(directory, plan, base_rank=None):
    """Assert that every tensor of the adapter has the rank that the plan gives its block, and the constant scaling.

    To show anything the ranks must differ from each other, or, where they may not, from `base_rank`.
    """
    ranks = adapter_ranks(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["rank_pattern"] == plan.rank_pattern()
    assert config["alpha_pattern"] == plan.alpha_pattern()
    scalings = {config["alpha_pattern"][key] / rank for key, rank in config["rank_pattern"].items()}
    assert scalings == {plan.scaling} == {config["lora_alpha"] / config["r"]}
    planned = {}
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        planned |= {module: rank for module in ranks if module.startswith(f"{site.name}.")}
    assert ranks == planned
    assert len({*plan.ranks, base_rank or plan.ranks[0]}) > 1, "uniform ranks, so that this test shows nothing"
