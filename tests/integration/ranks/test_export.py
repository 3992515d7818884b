"""An adapter of many ranks written with one: the same outputs in PEFT, and under the rules by which servers read."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from gelora_plugins import apply_plan, cli, select_ranks
from gelora_plugins.ranks.export import UniformAdapter, export_uniform
from tests.support.tiny import VOCABULARY, build
from tests.support.training import layers, peft_model, rows

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
FIRST, LAST = r"^model\.layers\.0\..*", r"^model\.layers\.2\..*"
RANKS = {FIRST: 2, LAST: 7}


def base(family: str) -> Any:
    if family != "mixtral":
        return build(family).eval()
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"intermediate_size": 24, "num_local_experts": 3, "vocab_size": VOCABULARY, "initializer_range": 0.3}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts)).eval()


def save(directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A trained adapter, as PEFT saves it: every matrix is drawn at random."""
    torch.manual_seed(0)
    model = get_peft_model(
        base(family), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(directory)
    return directory


def load(directory: Path, family: str = "llama") -> PeftModel:
    return PeftModel.from_pretrained(base(family), directory).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def check(tmp_path: Path, family: str = "llama", rank_multiple: int = 1, **options: Any) -> UniformAdapter:
    """Export what `save` makes; the logits are those of the original, and not those of the base model."""
    before = logits(load(save(tmp_path / "many", family, **options), family))
    assert (before - logits(base(family))).abs().max() > 0.1
    done = export_uniform(tmp_path / "many", tmp_path / "one", rank_multiple=rank_multiple)
    model = load(tmp_path / "one", family)
    assert torch.allclose(logits(model), before, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert (config["r"], config["lora_alpha"]) == (done.rank, done.lora_alpha)
    assert {layer.r["default"] for layer in layers(model).values()} == {done.rank}
    assert {layer.scaling["default"] for layer in layers(model).values()} == {done.lora_alpha / done.rank}
    return done


# The outputs


def test_one_scaling_leaves_lora_b_as_it_was(tmp_path: Path) -> None:
    done = check(tmp_path, rank_pattern=RANKS, alpha_pattern={FIRST: 4, LAST: 14})
    assert done == UniformAdapter(rank=7, lora_alpha=14, num_modules=21, folded=())
    many, one = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("many", "one"))
    assert set(many) == set(one)
    for key, value in many.items():
        padded, rank = one[key], min(value.shape) if "lora_A" in key else value.shape[1]
        assert torch.equal(padded[:rank] if "lora_A" in key else padded[:, :rank], value)
        assert not (padded[rank:] if "lora_A" in key else padded[:, rank:]).any()
        assert padded.dtype == value.dtype


def test_a_plan_of_geloras_own(tmp_path: Path) -> None:
    model = peft_model()
    plan = select_ranks(model, rows(), progress=False)
    apply_plan(model, plan)
    model.save_pretrained(tmp_path / "many")
    done = export_uniform(tmp_path / "many", tmp_path / "one")
    assert (done.rank, done.lora_alpha, done.folded) == (max(plan.ranks), 2 * max(plan.ranks), ())
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))


def test_scalings_that_differ_go_into_lora_b(tmp_path: Path) -> None:
    done = check(tmp_path, rank_pattern=RANKS, alpha_pattern={FIRST: 5, LAST: 7})
    assert (done.rank, done.lora_alpha, len(done.folded)) == (7, 14, 14)  # 2.5, 2 and 1 become 2


def test_rank_stabilised_lora_becomes_plain(tmp_path: Path) -> None:
    alphas = {FIRST: 8 * math.sqrt(2 / 4), LAST: 8 * math.sqrt(7 / 4)}  # as a plan keeps the scaling
    done = check(tmp_path, rank_pattern=RANKS, alpha_pattern=alphas, use_rslora=True)
    assert done.lora_alpha == 28  # scaling 4
    assert done.folded == ()


def test_rank_stabilised_lora_with_a_scaling_of_its_own_per_module(tmp_path: Path) -> None:
    done = check(tmp_path, rank_pattern=RANKS, use_rslora=True)
    assert isinstance(done.lora_alpha, int)
    assert len(done.folded) == 14


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"rank_pattern": {r"^transformer\.h\.1\..*": 6}, "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 3, "q_proj": 5}}),
        ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"], "rank_pattern": RANKS}),
        ("llama", {"rank_pattern": {FIRST: 2}, "init_lora_weights": "orthogonal"}),
        ("gpt2", {"lora_bias": True, "rank_pattern": {r"^transformer\.h\.1\..*": 6}, "fan_in_fan_out": True}),
        ("gpt2", {"bias": "lora_only", "rank_pattern": {r"^transformer\.h\.1\..*": 6}, "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "rank_pattern": RANKS}),
    ],
    ids=["Conv1D", "embedding", "modules_to_save", "orthogonal", "lora_bias", "bias", "some layers"],
)
def test_kinds_of_lora(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    done = check(tmp_path, family, rank_multiple=5, **options)
    assert done.rank in (5, 10)
    assert done.folded  # one alpha for several ranks: the scalings differ


def test_fused_experts_are_padded_expert_by_expert(tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    done = check(
        tmp_path,
        "mixtral",
        target_modules=["q_proj"],
        target_parameters=parameters,
        rank_pattern=RANKS,
        alpha_pattern={},
    )
    assert done.rank == 7
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    shapes = {key: tuple(value.shape) for key, value in tensors.items() if ".layers.0.mlp.experts" in key}
    assert {shape[0] for key, shape in shapes.items() if "lora_A" in key} == {3 * 7}
    assert len(shapes) == 4


def test_half_precision_keeps_its_dtype_and_an_exact_scaling(tmp_path: Path) -> None:
    alphas = {FIRST: 3 * 2 / 4, LAST: 3 * 7 / 4}
    save(tmp_path / "many", dtype=torch.bfloat16, lora_alpha=3, rank_pattern=RANKS, alpha_pattern=alphas)
    done = export_uniform(tmp_path / "many", tmp_path / "one")
    assert (done.lora_alpha, done.folded) == (5.25, ())
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert {layer.scaling["default"] for layer in layers(load(tmp_path / "one")).values()} == {0.75}


def test_what_is_no_lora_matrix_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "many", modules_to_save=["lm_head"], rank_pattern=RANKS, lora_dropout=0.1)
    export_uniform(tmp_path / "many", tmp_path / "one")
    many, one = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("many", "one"))
    others = [key for key in many if "lora_" not in key]
    assert others
    assert all(torch.equal(many[key], one[key]) for key in others)
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("many", "one"))
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {"r", "lora_alpha", "rank_pattern"}
    assert set(before) == set(after)


# What servers make of the files, by their own formulas


def one_alpha_over_r(config: dict[str, Any], rank: int) -> float:
    """SGLang 0.5.23 (srt/lora/lora.py) and vLLM before it read patterns (0.33 does): one factor for all modules."""
    return config["lora_alpha"] / config["r"]


def one_alpha_over_own_rank(config: dict[str, Any], rank: int) -> float:
    """llama.cpp (llama-adapter.h, get_scale), and Ollama: one alpha by the rank of each tensor."""
    return config["lora_alpha"] / rank


def served(directory: Path, scale: Callable[[dict[str, Any], int], float]) -> dict[str, torch.Tensor]:
    """Module -> base weight + scale * B A, from the two files alone."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    weights = dict(base("llama").named_parameters())
    merged = {}
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        merged[name] = weights[f"{name}.weight"].detach() + scale(config, len(a)) * b @ a
    return merged


def error(directory: Path, scale: Callable[[dict[str, Any], int], float], original: Path) -> float:
    """The largest difference between the weights that a server has and those of PEFT's own merge."""
    right = dict(load(original).merge_and_unload().named_parameters())
    found = served(directory, scale)
    assert len(found) == 21
    return max((weight - right[f"{name}.weight"].detach()).abs().max().item() for name, weight in found.items())


@pytest.mark.parametrize("scale", [one_alpha_over_r, one_alpha_over_own_rank])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {FIRST: 4, LAST: 14}},
        {"alpha_pattern": {FIRST: 5, LAST: 7}},
        {"use_rslora": True},
    ],
    ids=["one scaling", "several scalings", "rsLoRA"],
)
def test_every_servers_rule_gives_pefts_weights(
    tmp_path: Path, options: dict[str, Any], scale: Callable[[dict[str, Any], int], float]
) -> None:
    save(tmp_path / "many", rank_pattern=RANKS, **options)
    export_uniform(tmp_path / "many", tmp_path / "one", rank_multiple=8)
    assert error(tmp_path / "one", scale, tmp_path / "many") < 1e-5


def test_without_the_export_llama_cpps_rule_gives_other_weights(tmp_path: Path) -> None:
    save(tmp_path / "many", rank_pattern=RANKS, alpha_pattern={FIRST: 4, LAST: 14})
    assert error(tmp_path / "many", one_alpha_over_r, tmp_path / "many") < 1e-5
    assert error(tmp_path / "many", one_alpha_over_own_rank, tmp_path / "many") > 0.1


# The command


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "many", rank_pattern=RANKS)  # with one lora_alpha: scalings 4, 2 and 8 / 7
    arguments = ["export", str(tmp_path / "many"), str(tmp_path / "one"), "--uniform", "--rank-multiple", "16"]
    monkeypatch.setattr(sys, "argv", ["gelora", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "21 modules with rank 16 and lora_alpha 64 -> " in shown
    assert "The scaling of 14 modules differed" in shown
    assert {layer.r["default"] for layer in layers(load(tmp_path / "one")).values()} == {16}
