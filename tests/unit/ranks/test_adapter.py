"""What `adapter` makes of a model and a plan, without a measurement and without a training."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from gelora_plugins.errors import ApplyError, PlanError
from gelora_plugins.ranks.adapter import AppliedPlan, add_adapter, apply_plan
from gelora_plugins.ranks.find_adapter import CONFIG_ROUTE, require_adapter
from tests.support.ranks import COST, LINEARS, plan_for, ranks_of, scalings_of, short
from tests.support.tiny import build
from tests.support.training import LORA, layers, matrices, peft_model, state_of


def refusal(model, *ranks):
    """What `apply_plan` says; it must have changed nothing."""
    plan = plan_for(peft_model(), *(ranks or (2, 6, 7)))
    before = state_of(model)
    with pytest.raises(ApplyError) as caught:
        apply_plan(model, plan)
    assert state_of(model) == before
    return str(caught.value)


# --- a plan


@pytest.mark.parametrize("initialisation", [True, "gaussian"])
def test_apply_plan_gives_every_module_its_blocks_rank_and_says_so(initialisation):
    model = peft_model(init_lora_weights=initialisation)
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    applied = apply_plan(model, plan_for(model, 2, 4, 7))
    expected = {f"model.layers.{i}.{linear}": rank for i, rank in enumerate((2, 4, 7)) for linear in LINEARS}
    assert ranks_of(model) == expected
    assert applied == AppliedPlan(expected, tuple(name for name, rank in expected.items() if rank != 4))
    assert scalings_of(model) == {2.0}
    assert torch.equal(torch.get_rng_state(), random_state)
    for layer in layers(model).values():
        assert layer.lora_alpha["default"] == 2 * layer.r["default"]
        assert layer.lora_A["default"].weight.any(dim=1).all()
        assert not layer.lora_B["default"].weight.any()
    config = model.peft_config["default"]
    keys = [rf"(?<=^model\.layers\.{i}\.).*" for i in range(3)]
    assert config.rank_pattern == dict(zip(keys, (2, 4, 7), strict=True))
    assert config.alpha_pattern == dict(zip(keys, (4, 8, 14), strict=True))


def test_an_adapter_made_anew_of_the_configuration_has_the_same_ranks():
    model = peft_model(use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 3})
    apply_plan(model, plan_for(model, 2, 6, 7, use_rslora=True))
    again = get_peft_model(build("llama"), copy.deepcopy(model.peft_config["default"]))
    assert ranks_of(again) == ranks_of(model)
    scalings = {name: layer.scaling["default"] for name, layer in layers(model).items()}
    assert {name: layer.scaling["default"] for name, layer in layers(again).items()} == pytest.approx(scalings)
    scalings.pop("base_model.model.model.layers.1.self_attn.q_proj")
    assert list(scalings.values()) == pytest.approx([4.0] * 20)


def test_the_ranks_of_the_users_own_patterns_and_outside_the_blocks_stay():
    targets = ["q_proj", "v_proj", "lm_head"]
    model = peft_model(target_modules=targets, rank_pattern={"0.self_attn.q_proj": 3}, alpha_pattern={"2.*v_proj": 5})
    applied = apply_plan(model, plan_for(model, 2, 6, 7))
    expected = {f"model.layers.{i}.self_attn.{t}_proj": r for i, r in enumerate((2, 6, 7)) for t in "qv"}
    kept = {"model.layers.0.self_attn.q_proj": 3, "model.layers.2.self_attn.v_proj": 4, "lm_head": 4}
    assert ranks_of(model) == {**expected, **kept}
    assert applied.kept == tuple(kept)
    assert applied.ranks == {name: rank for name, rank in expected.items() if name not in kept}


def test_the_draw_of_a_module_depends_on_torchs_seed_and_on_its_own_name_alone():
    def drawn(seed, *ranks):
        model = peft_model()
        plan = plan_for(model, *ranks)
        torch.manual_seed(seed)
        apply_plan(model, plan)
        return [value for name, value in matrices(model).items() if ".lora_A." in name and ".layers.2." in name]

    first = drawn(5, 2, 2, 6)
    assert all(map(torch.equal, first, drawn(5, 7, 4, 6)))
    assert not any(map(torch.equal, first, drawn(6, 2, 2, 6)))


def test_modules_of_one_shape_are_not_drawn_alike():
    model = peft_model()
    apply_plan(model, plan_for(model, 5, 5, 5))
    drawn = [tuple(value.flatten().tolist()) for name, value in matrices(model).items() if ".lora_A." in name]
    assert len(drawn) == len(set(drawn)) == 21


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["q_proj"], "lora_bias": True}])
def test_what_a_matrix_was_beside_its_size_stays(options):
    model = peft_model(lora_dropout=0.25, **options).to(torch.bfloat16)
    model.add_adapter("other", LoraConfig(**{**LORA, **options}))
    for i, (name, p) in enumerate(model.named_parameters()):
        p.data = p.data.float() if ".default" in name else p.data
        p.requires_grad_(i % 3 == 0 or "lora_B" in name)
    for i, module in enumerate(model.modules()):
        module.training = i % 2 == 0
    parameters = {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    made_anew = ("lora_A.default", "lora_B.default", "lora_dropout.default", "lora_magnitude_vector.default")
    apply_plan(model, plan_for(model, 2, 6, 7))
    assert {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()} == parameters
    for name, module in model.named_modules():
        layer = name.partition(".lora_")[0]
        assert module.training == modes[layer if name.endswith(made_anew) else name], name


def test_a_failure_half_way_leaves_everything_as_it_was(monkeypatch):
    model = peft_model(lora_dropout=0.25)
    plan = plan_for(model, 2, 6, 7)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj.base_layer" in name or "lora_B" in name)
    before, objects = state_of(model), {**dict(model.named_parameters()), **dict(model.named_modules())}
    update, calls = LoraLayer.update_layer, []

    def failing(self, *args, **kwargs):
        calls.append(self)
        update(self, *args, **kwargs)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(LoraLayer, "update_layer", failing)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan)
    assert state_of(model) == before
    assert {**dict(model.named_parameters()), **dict(model.named_modules())} == objects
    assert set(ranks_of(model).values()) == {4}
    assert scalings_of(model) == {2.0}
    assert {layer.lora_alpha["default"] for layer in layers(model).values()} == {8}


def test_a_plan_for_other_modules_or_another_scaling_changes_nothing():
    model = peft_model()
    other_modules = plan_for(peft_model(target_modules=["q_proj"]), 2, 6, 7)
    before = state_of(model)
    with pytest.raises(PlanError, match=rf"costs 32 parameters in the plan and {COST} in the model"):
        apply_plan(model, other_modules)
    with pytest.raises(PlanError, match="keeps the scaling 4"):
        apply_plan(model, plan_for(model, 2, 6, 7, lora_alpha=16))
    assert state_of(model) == before


@pytest.mark.parametrize("planned", [True, False])
def test_add_adapter_makes_one_with_the_ranks_of_the_plan_or_the_users(planned):
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj", "lm_head"]}, rank_pattern={"v_proj": 3})
    plan = plan_for(peft_model(target_modules=["q_proj"]), 2, 6, 7) if planned else None
    before = copy.deepcopy(config)
    wrapped, applied = add_adapter(build("llama"), config, plan)
    kept = {f"model.layers.{i}.self_attn.v_proj": 3 for i in range(3)} | {"lm_head": 4}
    queries = dict(zip([f"model.layers.{i}.self_attn.q_proj" for i in range(3)], (2, 6, 7), strict=True))
    if not planned:
        queries = dict.fromkeys(queries, 4)
    assert ranks_of(wrapped) == {**queries, **kept}
    if planned:
        assert (applied.ranks, applied.changed) == (queries, tuple(queries))
        assert sorted(applied.kept) == sorted(kept)
    else:
        assert (applied.ranks, sorted(applied.changed), applied.kept) == (
            {**queries, **kept},
            sorted({**queries, **kept}),
            (),
        )
    assert (config.rank_pattern, config.alpha_pattern) == (before.rank_pattern, before.alpha_pattern)
    assert wrapped.peft_config["default"] is not config


def test_notes_count_the_modules_that_keep_their_ranks_and_name_three():
    text = (
        "target modules keep the ranks of your LoRA configuration, because its rank_pattern or alpha_pattern names "
        "them or because they lie outside the transformer blocks:"
    )
    assert AppliedPlan({}, ()).notes() == ()
    assert AppliedPlan({}, (), ("a", "b", "c")).notes() == (f"3 {text} a, b, c.",)
    assert AppliedPlan({}, (), ("a", "b", "c", "d")).notes() == (f"4 {text} a, b, c, ....",)


# --- what cannot be changed in place


def test_an_initialisation_that_cannot_be_run_again_is_refused():
    assert refusal(peft_model(init_lora_weights=False)) == (
        "init_lora_weights=False cannot be run again on an adapter that exists; in place GeLoRA takes True, "
        f"'gaussian'. {CONFIG_ROUTE}"
    )


@pytest.mark.parametrize("option", ["kasa_config", "use_bdlora", "arrow_config"])
def test_an_option_that_cannot_be_run_again_is_refused(option):
    model = peft_model()
    setattr(model.peft_config["default"], option, True)
    assert refusal(model) == f"{option} cannot be run again on an adapter that exists. {CONFIG_ROUTE}"


def test_a_peft_without_the_options_that_cannot_be_run_again_has_them_off():
    replace(require_adapter(peft_model()), config=SimpleNamespace(init_lora_weights=True)).check_fresh()


def test_invocation_tokens_outside_a_peft_model_are_refused():
    options = {**LORA, "alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}
    inside = get_peft_model(build("llama"), LoraConfig(**options))
    apply_plan(inside, plan_for(inside, 2, 6, 7))
    outside = build("llama")
    outside.add_adapter(LoraConfig(**options))
    assert refusal(outside) == (
        "The adapter has alora_invocation_tokens, which do nothing outside a PeftModel (PEFT 0.21): nothing would be "
        "trained. Use get_peft_model(model, config) instead of model.add_adapter(config)."
    )


def test_a_tensor_parallel_model_is_refused():
    model = peft_model()
    model.get_base_model()._tp_size = 1
    apply_plan(model, plan_for(model, 2, 6, 7))
    model = peft_model()
    model.get_base_model()._tp_size = 2
    assert model.get_base_model().tp_size == 2
    assert refusal(model) == f"The model is tensor-parallel; its adapter cannot be resized in place. {CONFIG_ROUTE}"


@pytest.mark.parametrize("value", [torch.empty(0), torch.empty(4, 16, device="meta")])
def test_a_sharded_model_is_refused(value):
    model = peft_model()
    layers(model)["base_model.model.model.layers.1.mlp.up_proj"].lora_A["default"].weight = torch.nn.Parameter(value)
    with pytest.raises(ApplyError) as caught:
        require_adapter(model).check_fresh()
    assert str(caught.value) == (
        f"lora_A of model.layers.1.mlp.up_proj is empty here: the model is sharded. {CONFIG_ROUTE}"
    )


@pytest.mark.parametrize(("target", "container"), [("mlp.up_proj", "lora_B"), ("embed_tokens", "lora_embedding_A")])
def test_a_trained_adapter_is_refused(target, container):
    model = peft_model(target_modules=["up_proj", "embed_tokens"])
    (name, layer), *_ = ((name, layer) for name, layer in layers(model).items() if name.endswith(target))
    entry = getattr(layer, container)["default"]
    with torch.no_grad():
        getattr(entry, "weight", entry)[-1, -1] = 1e-3
    with pytest.raises(ApplyError) as caught:
        require_adapter(model).check_fresh()
    assert str(caught.value) == (
        f"The adapter is trained already: {container} of {short(name)} is not 0. GeLoRA chooses ranks before training; "
        "train this adapter on without GeLoRA, or start from a fresh one."
    )
