"""Which kinds of LoRA GeLoRA takes, by which route: the table that integration/models/test_matrix.py runs cell by cell.

`matrix()` is the same table for the README.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, initialize_lora_eva_weights
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, EvaConfig, KasaConfig, LoraGAConfig, VeloraConfig
from peft.tuners.lora.loraga import preprocess_loraga

from tests.support.tiny import VOCABULARY, build

ROUTES = {
    "get_peft_model": "`get_peft_model`, then the callback",
    "add_adapter": "`model.add_adapter`, then the callback",
    "lora_config": "`GeLoRACallback(lora_config=...)`",
    "own loop": "`select_ranks`, `with_plan`, `get_peft_model`",
}
FIRST = 3  # the token that every row begins with
IN_PLACE, BEFORE = ("get_peft_model", "add_adapter"), ("lora_config", "own loop")

TWICE = "cannot be run again"
FUSED = "fused parameters"
# transformers 5.23 says so itself when the Trainer is made
PURE = {"lora_config": "purely quantized models"}
PURE_NOTE = "the Trainer itself takes no quantised model without an adapter"
MIXTRAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Kind:
    """A kind of LoRA: its options, the model that it is put on, and where it is refused.

    Attributes:
        options: for LoraConfig, beside r, lora_alpha and target_modules="all-linear".
        refused: route -> words of the error; the other routes train.
        model: makes the model.
        still: parts of the adapter that are not to be trained.
        note: for the README, how the routes that work differ from the plain case.
        fill: what PEFT wants done to the model and its data, in a loop of one's own: before or after the adapter.
    """

    options: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    model: Callable[[], Any] = lambda: build("llama")
    note: str = ""
    still: tuple[str, ...] = ()
    before: Callable[[Any, LoraConfig], None] | None = None
    after: Callable[[Any], None] | None = None


def experts(family: str) -> Callable[[], Any]:
    def make() -> Any:
        config = transformers.AutoConfig.for_model(family, **MIXTRAL)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.AutoModelForCausalLM.from_config(config).train()

    return make


def quantised(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        with tempfile.TemporaryDirectory() as directory:
            build("llama", hidden_size=64, intermediate_size=64, head_dim=32).save_pretrained(directory)
            quantisation = transformers.BitsAndBytesConfig(**options)
            return transformers.AutoModelForCausalLM.from_pretrained(
                directory, quantization_config=quantisation, dtype=torch.float32
            ).train()

    return make


def refused(routes: tuple[str, ...], words: str) -> dict[str, str]:
    return dict.fromkeys(routes, words)


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCABULARY, (1, 12), generator=generator)} for _ in range(8)]


def corda(model: Any, config: LoraConfig) -> None:
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which PEFT 0.21 does not install

    preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in batches()])
    model.train()


def lora_ga(model: Any, config: LoraConfig) -> None:
    preprocess_loraga(model, config, lambda: [model(**b, labels=b["input_ids"]).loss.backward() for b in batches()])
    model.zero_grad()


def eva(model: Any) -> None:
    initialize_lora_eva_weights(model, batches(), show_progress_bar=False)


ATTENTION = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, Kind] = {
    "LoRA": Kind(),
    "rsLoRA": Kind({"use_rslora": True}),
    "DoRA": Kind({"use_dora": True}),
    "DoRA and rsLoRA": Kind({"use_dora": True, "use_rslora": True}),
    "QLoRA, 4 bit": Kind({}, PURE, quantised(load_in_4bit=True, bnb_4bit_quant_type="nf4"), PURE_NOTE),
    "QDoRA, 4 bit": Kind({"use_dora": True}, PURE, quantised(load_in_4bit=True), PURE_NOTE),
    "QLoRA, 8 bit": Kind({}, PURE, quantised(load_in_8bit=True), PURE_NOTE),
    "`lora_bias`": Kind({"lora_bias": True, "target_modules": ["query", "value"]}, model=lambda: build("bert")),
    '`bias="all"`': Kind({"bias": "all", "target_modules": ["query", "value"]}, model=lambda: build("bert")),
    "Conv1D (GPT-2)": Kind(model=lambda: build("gpt2")),
    "embeddings and head too": Kind({"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]}, note="keep your r"),
    "tied embeddings and head": Kind(
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"], "ensure_weight_tying": True},
        model=lambda: build("llama", tie_word_embeddings=True),
        note="keep your r, stay tied",
    ),
    "`modules_to_save`": Kind({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "`trainable_token_indices`": Kind({"target_modules": ATTENTION, "trainable_token_indices": [3, 4]}),
    "`layers_to_transform`": Kind({"target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    "`exclude_modules`": Kind({"exclude_modules": r".*layers\.1\..*"}),
    "target modules as a regex": Kind({"target_modules": r".*layers\.[02]\..*(q_proj|down_proj)"}),
    "target modules by PEFT's default": Kind({"target_modules": None}),
    "your own `rank_pattern`": Kind(
        {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "v_proj": 2}, "alpha_pattern": {"up_proj": 6}},
        note="yours win, and are counted in the log",
    ),
    "`layer_replication`": Kind(
        {"layer_replication": [(0, 2), (1, 3)]}, refused=refused(BEFORE, "layer_replication"), note="each copy counts"
    ),
    "fused experts, `target_parameters`": Kind(
        {"target_modules": ATTENTION, "target_parameters": EXPERTS},
        refused=refused(BEFORE, FUSED),
        model=experts("mixtral"),
        note="counted expert by expert",
    ),
    "fused experts, all-linear": Kind(
        refused=refused(BEFORE, FUSED),
        model=experts("mixtral"),
        note="`gate_up_proj` keeps the 2 r that PEFT gives it, and is counted in the log",
    ),
    "aLoRA": Kind(
        {"alora_invocation_tokens": [FIRST], "task_type": "CAUSAL_LM"},
        {"add_adapter": "alora_invocation_tokens"},
        note="PEFT switches it on in a PeftModel only",
    ),
    "VeLoRA": Kind({"velora_config": VeloraConfig(num_groups=4)}),
    "KaSA": Kind({"kasa_config": KasaConfig()}, refused=refused(IN_PLACE, TWICE)),
    "BD-LoRA": Kind(
        {
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=1),
            "target_modules": ATTENTION,
        },
        refused=refused(IN_PLACE, TWICE),
    ),
    "gaussian": Kind({"init_lora_weights": "gaussian"}),
    "orthogonal": Kind(
        {"init_lora_weights": "orthogonal"},
        refused={**refused(IN_PLACE, TWICE), **refused(BEFORE, "even")},
        note="before the adapter, where the plan has even ranks only",
    ),
    "PiSSA": Kind({"init_lora_weights": "pissa"}, refused=refused(IN_PLACE, TWICE)),
    "OLoRA": Kind({"init_lora_weights": "olora"}, refused=refused(IN_PLACE, TWICE)),
    "MiCA": Kind(
        {"init_lora_weights": "mica"},
        refused=refused(IN_PLACE, TWICE),
        note="trains A alone, by design",
        still=("lora_B",),
    ),
    "EVA": Kind(
        {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
        refused={**refused(IN_PLACE, TWICE), "lora_config": "initialize_lora_eva_weights"},
        after=eva,
        note="with `rho=1.0`, which keeps the ranks",
    ),
    "CorDA": Kind(
        {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm"), "target_modules": ATTENTION},
        refused={**refused(IN_PLACE, TWICE), "lora_config": "preprocess_corda"},
        before=corda,
    ),
    "LoRA-GA": Kind(
        {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(), "target_modules": ["q_proj"]},
        refused={**refused(IN_PLACE, TWICE), "lora_config": "preprocess_loraga"},
        before=lora_ga,
    ),
}


def matrix() -> str:
    """The table for the README."""
    lines = ["| kind | " + " | ".join(ROUTES.values()) + " | |", "| --- |" + " --- |" * (len(ROUTES) + 1)]
    for name, kind in KINDS.items():
        cells = ["refused" if route in kind.refused else "yes" for route in ROUTES]
        lines.append(f"| {name} | {' | '.join(cells)} | {kind.note} |")
    return "\n".join(lines)
