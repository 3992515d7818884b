"""Trainings with TRL: data of each kind, arguments, a policy whose ranks are known, what must have been saved."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file

from gelora_plugins import GeLoRAConfig, RankPlan, hookimpl
from tests.support.tiny import BLOCKS

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
