"""Every family of models: it trains with the planned ranks, or it is refused with a way out that works."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, default_data_collator

from gelora_plugins import GeLoRACallback, GeLoRAConfig, GeLoRAError, hookimpl, select_ranks
from gelora_plugins.errors import LayoutError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.probe import pooling
from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.ranks.find_adapter import find_adapter
from gelora_plugins.ranks.rehearsal import config_sites
from tests.support.families import FAMILIES, SIZES, TEXT, VISION, Family, lora, of
from tests.support.probing import features_of
from tests.support.rows import FORMATS, Format
from tests.support.tiny import VOCABULARY, build
from tests.support.training import arguments, layers, saved_plan, state_of

RANKS = [2, 6, 5, 7, 3]
GELORA = GeLoRAConfig(policy="steps")
READ = [name for name, family in FAMILIES.items() if family.stacks]
REFUSED = [name for name, family in FAMILIES.items() if not family.stacks]


class Steps:
    @hookimpl
    def register_rank_policies(self) -> dict[str, Any]:
        return {"steps": lambda profile, sites, base_rank, config: RANKS[: len(sites)]}


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)
    plugin = Steps()
    plugin_manager().register(plugin)
    yield
    plugin_manager().unregister(plugin)


def trainer_of(family: Family | Format, model: nn.Module, directory: Path, callback: GeLoRACallback) -> Trainer:
    args = arguments(directory, max_steps=1, per_device_train_batch_size=2, remove_unused_columns=False)
    return Trainer(
        model=model, args=args, train_dataset=family.rows(), data_collator=family.collator, callbacks=[callback]
    )


def block_ranks(model: nn.Module) -> dict[str, set[int]]:
    """The ranks of the adapted modules of each block."""
    adapter = find_adapter(model)
    assert adapter is not None
    blocks = [block.name for block in find_transformers_layout(model).blocks]
    return {
        block: {layer.r["default"] for name, layer in adapter.layers.items() if name.startswith(f"{block}.")}
        for block in blocks
    }


@pytest.mark.parametrize("name", READ)
def test_a_family_that_is_read_trains_with_the_planned_ranks(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = get_peft_model(family.model(), lora(family))
    trainer_of(family, model, tmp_path, GeLoRACallback(GELORA)).train()
    assert tuple(len(stack) for stack in saved_plan(tmp_path).profile.layout.stacks) == family.stacks
    assert list(block_ranks(model).values()) == [{rank} for rank in RANKS[: sum(family.stacks)]]


@pytest.mark.parametrize("name", READ)
def test_points_are_those_of_rows_that_the_whole_model_reads_one_by_one(name: str) -> None:
    family = FAMILIES[name]
    model, some = family.model().eval(), family.rows()[:3]
    layout = find_transformers_layout(model)
    collate = family.collator or default_data_collator
    points = features_of(model, layout, [collate(some)], pooling.mean).points
    alone = [hidden_states(model, layout, collate([row])) for row in some]
    for boundary, (ours, theirs) in enumerate(zip(points, zip(*alone, strict=True), strict=True)):
        lengths = [len(row.get("input_ids", ())) or None for row in some]  # Longformer pads, beyond them
        expected = torch.stack([hidden[0, :n].mean(dim=0) for hidden, n in zip(theirs, lengths, strict=True)])
        assert torch.allclose(ours, expected, atol=1e-4, rtol=1e-4), boundary


def hidden_states(model: nn.Module, layout: ModelLayout, inputs: Any) -> list[torch.Tensor]:
    """What enters and leaves each block while the whole model reads a batch, labels and all, of one row."""
    found: list[torch.Tensor] = []
    handles = []
    for stack in layout.stacks:
        blocks = [model.get_submodule(block.name) for block in stack]
        handles.append(
            blocks[0].register_forward_pre_hook(
                lambda module, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        handles += [
            block.register_forward_hook(
                lambda module, args, output: found.append(output[0] if isinstance(output, tuple) else output)
            )
            for block in blocks
        ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", READ)
def test_modules_counted_before_the_adapter_are_those_that_it_has(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    layout = find_transformers_layout(model)
    state = state_of(model)
    before = config_sites(model, layout, lora(family))
    assert state_of(model) == state
    adapter = find_adapter(get_peft_model(model, lora(family)))
    assert adapter is not None
    assert adapter.sites(layout) == before


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_refused_is_left_as_it_was_and_trains_with_its_own_ranks(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    model = get_peft_model(family.model(), lora(family))
    before = state_of(model)
    trainer = trainer_of(family, model, tmp_path, GeLoRACallback(GELORA))
    with pytest.raises(GeLoRAError, match=family.refused) as caught:
        trainer.train()
    assert any(way in str(caught.value) for way in ('on_failure="keep"', "GeLoRACallback(plan="))
    assert state_of(model)[:4] == before[:4]
    trainer_of(family, model, tmp_path, GeLoRACallback(replace(GELORA, on_failure="keep"))).train()
    assert set().union(*(layer.r.values() for layer in layers(model).values())) == {4}


def test_multiple_choice_takes_a_plan_that_was_made_of_one_row_for_each_sequence(tmp_path: Path) -> None:
    family = FAMILIES["BERT, multiple choice"]
    model = get_peft_model(family.model(), lora(family))
    sequences = [{"input_ids": ids} for row in family.rows() for ids in row["input_ids"]]
    select_ranks(model, sequences, GELORA, progress=False).save(tmp_path / "plan.json")
    trainer_of(family, model, tmp_path, GeLoRACallback(plan=str(tmp_path / "plan.json"))).train()
    assert list(block_ranks(model).values()) == [{rank} for rank in RANKS[:3]]


def test_mllama_without_images_takes_a_layout_without_the_blocks_that_read_them(tmp_path: Path) -> None:
    class TextBlocks:
        @hookimpl
        def find_model_layout(self, model: nn.Module) -> ModelLayout:
            layout = find_transformers_layout(model)
            return replace(layout, stacks=(tuple(b for b in layout.blocks if not b.name.endswith(".1")),))

    family = FAMILIES["Mllama, rows without images"]
    model = get_peft_model(family.model(), lora(family))
    plugin = TextBlocks()
    plugin_manager().register(plugin)
    try:
        trainer_of(family, model, tmp_path, GeLoRACallback(GELORA)).train()
    finally:
        plugin_manager().unregister(plugin)
    assert list(block_ranks(model).values()) == [{2}, {4}, {6}, {5}]


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.documents])
def test_rows_that_are_read_are_measured_and_trained_on(tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    model = get_peft_model(kind.model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    trainer_of(kind, model, tmp_path, GeLoRACallback(GELORA)).train()
    assert saved_plan(tmp_path).profile.num_documents == kind.documents
    assert list(block_ranks(model).values()) == [{rank} for rank in RANKS[:3]]


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if not kind.documents])
def test_rows_that_are_refused_leave_the_model_as_it_was(tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    model = get_peft_model(kind.model(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    before = state_of(model)
    with pytest.raises(GeLoRAError, match=kind.refused):
        trainer_of(kind, model, tmp_path, GeLoRACallback(GELORA)).train()
    assert state_of(model)[:4] == before[:4]


def test_what_peft_does_not_adapt_is_refused_before_the_probe() -> None:
    model = FAMILIES["Mamba"].model()
    with pytest.raises(LayoutError, match=r"'out_proj' is incompatible with Mamba.*exclude_modules="):
        select_ranks(model, [], progress=False)  # rows are read later


@pytest.mark.parametrize("targets", [["self_attn"], ["q_proj", "mlp"], ["nothing_like_it"]])
def test_target_modules_that_peft_cannot_adapt_are_refused_before_the_probe(targets: list[str]) -> None:
    with pytest.raises(LayoutError, match="PEFT does not take this LoRA configuration for LlamaForCausalLM"):
        select_ranks(build("llama"), [], lora_config=LoraConfig(target_modules=targets), progress=False)


def test_a_convolution_in_a_block_is_counted_before_the_adapter_as_in_it() -> None:
    conformer = {"feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3, "position_embeddings_type": None}
    model = of(
        "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig", **SIZES, **conformer, vocab_size=VOCABULARY, pad_token_id=0
    )()
    layout = find_transformers_layout(model)
    config = LoraConfig(r=4, target_modules=["pointwise_conv1", "linear_q"])
    before = config_sites(model, layout, config)
    adapter = find_adapter(get_peft_model(model, config))
    assert adapter is not None
    assert before == adapter.sites(layout)
    assert {site.parameters_per_rank for site in before} == {(16 + 16) + (16 + 32)}


def test_git_has_the_blocks_of_its_text_and_not_those_of_its_images() -> None:
    git = of("GitForCausalLM", "GitConfig", **{**TEXT, "num_hidden_layers": 2}, vision_config=VISION)()
    assert [block.name for block in find_transformers_layout(git).blocks] == [f"git.encoder.layer.{i}" for i in (0, 1)]
