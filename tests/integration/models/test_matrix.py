"""Every kind of LoRA by every route: it trains with the planned ranks, or it is refused before the first step."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer

from gelora_plugins import (
    GeLoRACallback,
    GeLoRAConfig,
    GeLoRAError,
    RankPlan,
    apply_plan,
    hookimpl,
    select_ranks,
)
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.ranks.find_adapter import find_adapter
from gelora_plugins.ranks.patterns import matches_pattern
from gelora_plugins.ranks.plan_check import with_plan
from tests.support.kinds import FIRST, IN_PLACE, KINDS, PURE, ROUTES, Kind
from tests.support.tiny import build
from tests.support.training import Watch, peft_model, rows, saved_plan, state_of, trainer_for

GELORA = GeLoRAConfig(policy="steps")
CELLS = [(name, route) for name in KINDS for route in ROUTES]


class Steps:
    """A policy whose ranks differ from block to block, and from every other rank here."""

    @hookimpl
    def register_rank_policies(self) -> dict[str, Any]:
        return {"steps": lambda profile, sites, base_rank, config: [2, 6, 5, 7][: len(sites)]}


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)  # half the time
    plugin = Steps()
    plugin_manager().register(plugin)
    yield
    plugin_manager().unregister(plugin)


def lora(kind: Kind) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **kind.options})


def dataset(model: nn.Module) -> list[dict[str, Any]]:
    ids = [[FIRST, *row["input_ids"]] for row in rows(60)]
    classifies = "SequenceClassification" in type(getattr(model, "base_model", model)).__name__ + type(model).__name__
    return [{"input_ids": i, "labels": i[1] % 2 if classifies else i} for i in ids]


def prepare(kind: Kind, route: str, model: Any) -> tuple[Any, GeLoRACallback | None, RankPlan | None]:
    """The model as it goes to the Trainer, the callback, and the plan where it is made before."""
    config = lora(kind)
    if route == "lora_config":
        return model, GeLoRACallback(GELORA, lora_config=config), None
    plan = None
    if route == "own loop":
        plan = select_ranks(model, dataset(model), GELORA, lora_config=config, progress=False)
        config = with_plan(config, plan)
    if kind.before is not None:
        kind.before(model, config)
    if route == "add_adapter":
        model.add_adapter(config)
        return model, GeLoRACallback(GELORA), None
    model = get_peft_model(model, config)
    if route == "get_peft_model":
        return model, GeLoRACallback(GELORA), None
    if kind.after is not None:
        kind.after(model)
    return model, None, plan


@pytest.mark.parametrize(("name", "route"), [cell for cell in CELLS if cell[1] not in KINDS[cell[0]].refused])
def test_a_kind_that_is_taken_trains_with_the_planned_ranks(tmp_path: Path, name: str, route: str) -> None:
    kind = KINDS[name]
    torch.manual_seed(0)
    bare = kind.model()
    data = dataset(bare)
    model, callback, plan = prepare(kind, route, bare)
    watch = Everything()
    trainer = trainer_for(model, tmp_path, callback, train_dataset=data)
    trainer.add_callback(watch)
    trainer.train()
    check_ranks(trainer.model, plan or saved_plan(tmp_path), lora(kind))
    check_trained(trainer, watch, kind)


class Everything(Watch):
    """All parameters as they were when training began, and whether they were to be trained."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.trained = {name for name, p in model.named_parameters() if p.requires_grad}


def check_ranks(model: nn.Module, plan: RankPlan, config: LoraConfig) -> None:
    adapter = find_adapter(model)
    assert adapter is not None
    planned = dict(zip((site.name for site in plan.sites), plan.ranks, strict=True))
    seen = set()
    for name, layer in adapter.layers.items():
        block = next((site for site in planned if name.startswith(f"{site}.")), None)
        if block is None or matches_pattern(config, name) or theirs(adapter.config, name):
            continue
        seen.add(block)
        assert rank_of(layer) == planned[block], name
        assert layer.scaling["default"] == pytest.approx(plan.scaling, rel=1e-12), name
    assert seen == set(planned)


def theirs(config: LoraConfig, name: str) -> bool:
    """Fused experts that PEFT itself gave a pattern."""
    return name.endswith(".gate_up_proj") and r".*\.gate_up_proj" in config.rank_pattern


def rank_of(layer: LoraLayer) -> int:
    experts = getattr(layer, "num_experts", 1)
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"].shape[0]
    rank, columns = layer.lora_A["default"].weight.shape[0], layer.lora_B["default"].weight.shape[1]
    assert rank == columns
    return rank // experts


def check_trained(trainer: Trainer, watch: Everything, kind: Kind) -> None:
    """Exactly what was to be trained has moved, and that is all matrices of the adapter."""
    after = dict(trainer.model.named_parameters())
    moved = {name for name, value in watch.before.items() if not torch.equal(after[name], value)}
    assert moved == watch.trained
    still = {name for name in after if "lora_" in name and name not in moved}
    assert {part for name in still for part in name.split(".") if part.startswith("lora_")} == set(kind.still)
    assert moved


@pytest.mark.parametrize(("name", "route"), [cell for cell in CELLS if cell[1] in KINDS[cell[0]].refused])
def test_a_kind_that_is_refused_changes_nothing_and_names_the_way_out(tmp_path: Path, name: str, route: str) -> None:
    kind = KINDS[name]
    words = kind.refused[route]
    torch.manual_seed(0)
    model: Any = kind.model()
    data = dataset(model)
    in_place = route in IN_PLACE
    if in_place:
        model, _, _ = prepare(kind, route, model)
    before = state_of(model)[:4], {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = ValueError if words in PURE.values() else GeLoRAError

    def attempt() -> None:
        made, callback, _ = (model, GeLoRACallback(GELORA), None) if in_place else prepare(kind, route, model)
        trainer_for(made, tmp_path, callback, train_dataset=data).train()

    with pytest.raises(expected, match=words) as caught:
        attempt()
    assert expected is ValueError or any(way in str(caught.value) for way in ("get_peft_model", "init_lora_weights="))
    assert state_of(model)[:4] == before[0]
    assert all(torch.equal(p, before[1][name]) for name, p in model.named_parameters())
    assert not (tmp_path / "gelora").exists()


@pytest.mark.parametrize(
    ("name", "route"),
    [("your own `rank_pattern`", route) for route in ROUTES if route != "own loop"]
    + [("embeddings and head too", "get_peft_model"), ("fused experts, all-linear", "get_peft_model")],
)
def test_modules_that_keep_the_users_ranks_are_counted_in_the_log(
    tmp_path: Path, name: str, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    kind = KINDS[name]
    model = kind.model()
    data = dataset(model)
    model, callback, _ = prepare(kind, route, model)
    trainer = trainer_for(model, tmp_path, callback, train_dataset=data)
    trainer.train()
    adapter = find_adapter(trainer.model)
    assert adapter is not None
    blocks = [f"{site.name}." for site in saved_plan(tmp_path).sites]
    kept = [
        layer
        for layer in adapter.layers
        if matches_pattern(lora(kind), layer) or theirs(adapter.config, layer) or not layer.startswith(tuple(blocks))
    ]
    assert f"{len(kept)} target modules keep the ranks of your LoRA configuration" in caplog.text
    assert kept[0] in caplog.text


@pytest.mark.parametrize(
    "name", ["LoRA", "`layers_to_transform`", "`exclude_modules`", "your own `rank_pattern`", "embeddings and head too"]
)
def test_ranks_chosen_before_the_adapter_are_those_chosen_for_it(name: str) -> None:
    kind, config = KINDS[name], GeLoRAConfig(policy="budget")
    data = dataset(kind.model())
    before = select_ranks(kind.model(), data, config, lora_config=lora(kind), progress=False)
    for_it = select_ranks(get_peft_model(kind.model(), lora(kind)), data, config, progress=False)
    assert before.sites == for_it.sites
    assert before.ranks == for_it.ranks


def test_fused_experts_are_counted_expert_by_expert_and_their_adapter_loads_again(tmp_path: Path) -> None:
    kind = KINDS["fused experts, `target_parameters`"]
    model, callback, _ = prepare(kind, "get_peft_model", kind.model())
    trainer = trainer_for(model, tmp_path, callback, train_dataset=dataset(model))
    trainer.train()
    attention = (16 + 16) + (16 + 8)
    experts = 2 * ((16 + 16) + (8 + 16))  # gate and up of 8 each, and down
    assert {site.parameters_per_rank for site in saved_plan(tmp_path).sites} == {attention + experts}
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(kind.model(), tmp_path / "adapter")
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(again.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_experts_that_peft_fuses_keep_its_ranks_and_their_adapter_loads_again(tmp_path: Path) -> None:
    kind = KINDS["fused experts, all-linear"]
    model, callback, _ = prepare(kind, "get_peft_model", kind.model())
    trainer = trainer_for(model, tmp_path, callback, train_dataset=dataset(model))
    trainer.train()
    adapter = find_adapter(trainer.model)
    assert adapter is not None
    assert {rank_of(layer) for name, layer in adapter.layers.items() if name.endswith(".gate_up_proj")} == {8}
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(kind.model(), tmp_path / "adapter")
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(again.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_of_several_adapters_the_active_one_gets_the_ranks(tmp_path: Path) -> None:
    model = peft_model()
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    trainer = trainer_for(model, tmp_path, GeLoRACallback(GELORA))
    trainer.train()
    adapter = find_adapter(model)
    assert adapter is not None
    assert [adapter.layers[f"model.layers.{i}.self_attn.q_proj"].r["second"] for i in range(3)] == [2, 6, 5]
    after = {name: p for name, p in model.named_parameters() if ".default." in name}
    assert all(torch.equal(after[name], value) and not after[name].requires_grad for name, value in before.items())
    assert model.peft_config["default"].rank_pattern == {}


def test_several_active_adapters_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), name)
    model.set_adapter(["first", "second"])
    with pytest.raises(GeLoRAError, match="The adapters first, second are active; expected one"):
        trainer_for(model, tmp_path, GeLoRACallback(GELORA)).train()


@pytest.mark.parametrize("targets", [["q_proj", "w1", "w3"], "all-linear", r".*(q_proj|w1|w3)"])
def test_target_modules_that_peft_would_fuse_are_refused_before_the_adapter(targets: Any) -> None:
    config = LoraConfig(r=4, target_modules=targets)
    kind = KINDS["fused experts, all-linear"]
    with pytest.raises(GeLoRAError, match=r"cannot be counted before .* get_peft_model\(model, config\)"):
        select_ranks(kind.model(), rows(60), GELORA, lora_config=config, progress=False)


def test_an_adapter_on_the_attention_alone_is_not_taken_for_one_on_experts() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    kind = KINDS["fused experts, all-linear"]
    plan = select_ranks(kind.model(), rows(60), GELORA, lora_config=config, progress=False)
    assert plan.ranks == (2, 6, 5)


def test_tied_embeddings_and_head_stay_tied() -> None:
    kind = KINDS["tied embeddings and head"]
    model = get_peft_model(kind.model(), lora(kind))
    apply_plan(model, select_ranks(model, rows(60), GELORA, progress=False))
    adapter = find_adapter(model)
    assert adapter is not None
    head, embedding = adapter.layers["lm_head"], adapter.layers["model.embed_tokens"]
    for mine, theirs in (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A")):
        shared = getattr(embedding, theirs)["default"]
        assert getattr(head, mine)["default"].weight.data_ptr() == shared.data_ptr()


def test_orthogonal_takes_a_plan_with_even_ranks() -> None:
    config = lora(KINDS["orthogonal"])
    plan = select_ranks(build("llama"), rows(60), GELORA, lora_config=config, progress=False)
    even = dataclasses.replace(plan, ranks=(2, 6, 4))
    adapter = find_adapter(get_peft_model(build("llama"), with_plan(config, even)))
    assert adapter is not None
    assert [rank_of(adapter.layers[f"model.layers.{i}.mlp.up_proj"]) for i in range(3)] == [2, 6, 4]
