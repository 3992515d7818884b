"""What `adapter` makes of a model and a plan, without a measurement and without a training."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from gelora_plugins.errors import ApplyError, LayoutError, PlanError
from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.ranks.adapter import AppliedPlan, add_adapter, apply_config, apply_plan, has_ranks_of
from gelora_plugins.ranks.find_adapter import CONFIG_ROUTE, find_adapter, require_adapter
from gelora_plugins.ranks.plan import layout_sites
from tests.support.kinds import KINDS
from tests.support.plans import make_plan, make_profile
from tests.support.tiny import build
from tests.support.training import LORA, layers, matrices, peft_model, state_of

LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
COST = (16 + 16) + (16 + 8) + (16 + 8) + (16 + 16) + 3 * (16 + 24)  # of one rank of a block


def layout_of(model):
    return find_transformers_layout(model)


def plan_for(model, *ranks, lora_alpha=8, use_rslora=False):
    """A plan with these ranks for the adapter of `model`, or for one of `LORA` where it has none."""
    layout = layout_of(model)
    adapter = find_adapter(model) or find_adapter(peft_model())
    return replace(
        make_plan(),
        profile=replace(make_profile([1.0] * layout.num_boundaries), layout=layout),
        sites=adapter.sites(layout),
        ranks=ranks,
        base_rank=LORA["r"],
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
    )


def block_of(name):
    return int(name.partition("layers.")[2][0])


def short(name):
    return name.removeprefix("base_model.model.")


def ranks_of(model):
    """Rank of every target module as its matrices have it."""
    found = {}
    for name, layer in layers(model).items():
        rows, columns = layer.lora_A["default"].weight.shape[0], layer.lora_B["default"].weight.shape[1]
        assert rows == columns == layer.r["default"]
        found[short(name)] = rows
    return found


def scalings_of(model):
    return {layer.scaling["default"] for layer in layers(model).values()}


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


# --- a checkpoint's configuration


def test_the_ranks_and_alphas_of_a_checkpoint_are_taken_over():
    trained = peft_model(
        rank_pattern={"q_proj": 3}, alpha_pattern={"layers.2.*": 5}, target_modules=["q_proj", "v_proj"]
    )
    saved = trained.peft_config["default"]
    model = peft_model(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"])
    assert not has_ranks_of(model, saved)
    applied = apply_config(model, saved)
    assert has_ranks_of(model, saved)
    expected = ranks_of(trained)
    assert ranks_of(model) == expected
    assert applied == AppliedPlan(expected, tuple(expected))
    for name, layer in layers(model).items():
        assert layer.lora_alpha == layers(trained)[name].lora_alpha
        assert layer.scaling == layers(trained)[name].scaling
    mine = model.peft_config["default"]
    assert (mine.r, mine.lora_alpha, mine.rank_pattern, mine.alpha_pattern) == (
        saved.r,
        saved.lora_alpha,
        saved.rank_pattern,
        saved.alpha_pattern,
    )
    assert mine.rank_pattern is not saved.rank_pattern
    assert mine.alpha_pattern is not saved.alpha_pattern


def test_alphas_alone_are_taken_over_by_a_trained_adapter_and_its_matrices_stay():
    model = peft_model()
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].weight.fill_(0.5)
    before, objects = matrices(model), dict(model.named_parameters())
    saved = LoraConfig(**{**LORA, "lora_alpha": 16}, alpha_pattern={"q_proj": 8})
    assert not has_ranks_of(model, saved)
    applied = apply_config(model, saved)
    assert has_ranks_of(model, saved)
    assert applied.changed == ()
    assert {name.rpartition(".")[2]: layer.scaling["default"] for name, layer in layers(model).items()} == {
        **{linear.partition(".")[2]: 4.0 for linear in LINEARS},
        "q_proj": 2.0,
    }
    assert all(torch.equal(value, before[name]) for name, value in matrices(model).items())
    assert all(objects[name] is p for name, p in model.named_parameters())


def test_one_module_with_another_rank_or_alpha_is_enough_to_differ():
    model = peft_model()
    assert has_ranks_of(model, LoraConfig(**LORA))
    assert not has_ranks_of(model, LoraConfig(**LORA, rank_pattern={"layers.2.mlp.down_proj": 5}))
    assert not has_ranks_of(model, LoraConfig(**LORA, alpha_pattern={"layers.2.mlp.down_proj": 9}))
    assert not has_ranks_of(build("llama"), LoraConfig(**LORA))


def test_a_checkpoint_with_other_ranks_is_not_taken_over_by_a_trained_adapter():
    model = peft_model()
    with torch.no_grad():
        layers(model)["base_model.model.model.layers.0.mlp.up_proj"].lora_B["default"].weight.fill_(0.5)
    before = state_of(model)
    with pytest.raises(ApplyError, match=r"trained already: lora_B of model\.layers\.0\.mlp\.up_proj is not 0"):
        apply_config(model, LoraConfig(**LORA, rank_pattern={"layers.2.mlp.down_proj": 5}))
    assert state_of(model) == before


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_is_as_rank_stabilised_as_the_model(saved):
    model = peft_model(use_rslora=not saved)
    before = state_of(model)
    with pytest.raises(ApplyError) as caught:
        apply_config(model, LoraConfig(**LORA, use_rslora=saved))
    assert str(caught.value) == (
        f"The checkpoint was trained with use_rslora={saved}, and the model's LoRA configuration says {not saved}. Set "
        "it as it was."
    )
    assert state_of(model) == before


# --- which adapter


def test_the_layers_of_an_adapter_go_by_the_names_that_peft_matches():
    model = peft_model()
    adapter = require_adapter(model)
    assert list(adapter.layers) == [f"model.layers.{i}.{linear}" for i in range(3) for linear in LINEARS]
    assert (adapter.model, adapter.name) == (model, "default")
    fused = get_peft_model(KINDS["fused experts, all-linear"].model(), LoraConfig(**LORA))
    names = {name for name in require_adapter(fused).layers if "experts" in name}
    assert names == {f"model.layers.{i}.mlp.experts.{p}" for i in range(3) for p in ("gate_up_proj", "down_proj")}


def test_a_model_without_an_adapter_has_none():
    assert find_adapter(build("llama")) is None
    with pytest.raises(ApplyError) as caught:
        require_adapter(build("llama"))
    assert str(caught.value) == (
        "The model has no LoRA adapter; expected one to give ranks to. Wrap it with get_peft_model(model, "
        "LoraConfig(...)), or pass GeLoRACallback(lora_config=LoraConfig(...)); with TRL pass peft_config."
    )


def test_the_active_adapter_is_the_one():
    model = build("llama")
    for name, target in (("first", "q_proj"), ("second", "v_proj")):
        model.add_adapter(LoraConfig(**{**LORA, "target_modules": [target]}), name)
    model.set_adapter("second")
    adapter = require_adapter(model)
    assert (adapter.name, list(adapter.layers)) == ("second", [f"model.layers.{i}.self_attn.v_proj" for i in range(3)])
    model.set_adapter(["first", "second"])
    with pytest.raises(ApplyError) as caught:
        find_adapter(model)
    assert str(caught.value) == ("The adapters first, second are active; expected one. Activate the one to be trained.")


def test_an_adapter_that_is_not_lora_is_refused():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ApplyError, match=r"^The adapter 'default' is PeftType\.IA3; GeLoRA chooses ranks for LoRA onl"):
        find_adapter(get_peft_model(build("llama"), config))


def test_the_sites_are_the_blocks_at_the_cost_of_what_is_free():
    def sites(**options):
        model = peft_model(**options)
        return [(site.name, site.parameters_per_rank) for site in require_adapter(model).sites(layout_of(model))]

    assert sites() == [(f"model.layers.{i}", COST) for i in range(3)]
    assert sites(r=1) == sites(r=7) == sites()
    assert sites(rank_pattern={"1.mlp.*": 3}) == [
        ("model.layers.0", COST),
        ("model.layers.1", 112),
        ("model.layers.2", COST),
    ]
    assert sites(rank_pattern={"1.*": 3}) == [("model.layers.0", COST), ("model.layers.2", COST)]
    assert sites(target_modules=["q_proj", "embed_tokens", "lm_head"]) == [(f"model.layers.{i}", 32) for i in range(3)]
    with pytest.raises(LayoutError) as caught:
        sites(rank_pattern={".*proj": 3})
    assert str(caught.value) == (
        "None of the 21 target modules of the adapter is free to get a rank: expected some in the transformer blocks "
        "that `rank_pattern` and `alpha_pattern` of your LoRA configuration leave open."
    )


def test_the_sites_are_those_of_the_layout_where_every_linear_map_is_adapted():
    model = peft_model()
    assert require_adapter(model).sites(layout_of(model)) == layout_sites(layout_of(model), lambda name: True)
    (site, *_) = require_adapter(peft_model(target_modules=["k_proj"])).sites(layout_of(model))
    assert site.max_rank == 8


def test_a_site_has_no_largest_rank_where_no_layer_says_its_sides():
    model = peft_model()
    for layer in layers(model).values():
        layer.in_features = 0
    assert {site.max_rank for site in require_adapter(model).sites(layout_of(model))} == {None}


def test_an_adapter_made_with_the_ranks_of_a_plan_has_nothing_left_to_choose():
    plan = plan_for(peft_model(), 2, 6, 7)
    model = get_peft_model(build("llama"), LoraConfig(**plan.lora_config_kwargs(), target_modules="all-linear"))
    with pytest.raises(LayoutError) as caught:
        require_adapter(model).sites(layout_of(model))
    assert str(caught.value) == (
        "The adapter was made with the ranks of a plan (rank_pattern names whole blocks), and none of its 21 target "
        "modules is left to choose a rank for. Train it as it is, with GeLoRACallback(plan=...) to check it, or make "
        "the adapter without the plan's patterns."
    )


def test_the_parameters_of_an_adapter_are_not_those_of_the_layer_below_it():
    model = get_peft_model(build("llama"), LoraConfig(**LORA), adapter_name="weight")
    adapter = require_adapter(model)
    for layer in adapter.layers.values():
        assert [key for key, _ in adapter.parameters(layer)] == ["lora_A.weight.weight", "lora_B.weight.weight"]


def test_the_cost_of_fused_experts_is_that_of_every_expert():
    kind = KINDS["fused experts, `target_parameters`"]
    model = get_peft_model(kind.model(), LoraConfig(**{**LORA, **kind.options}))
    sites = require_adapter(model).sites(layout_of(model))
    experts = 2 * ((16 + 16) + (8 + 16))  # gate and up of 8 each, and down
    assert {site.parameters_per_rank for site in sites} == {(16 + 16) + (16 + 8) + experts}


def test_the_cost_is_the_same_where_the_matrices_are_elsewhere():
    model = peft_model()
    whole = require_adapter(model).sites(layout_of(model))
    for name, parameter in model.named_parameters():
        parameter.data = torch.empty(0) if "lora_" in name else parameter.data
    assert require_adapter(model).sites(layout_of(model)) == whole


def test_a_model_that_is_none_of_transformers_is_not_taken_for_a_tensor_parallel_one():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    require_adapter(model).check_fresh()


def test_eleven_blocks_are_not_taken_for_one_another():
    model = get_peft_model(build("llama", num_hidden_layers=11), LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    apply_plan(model, plan_for(model, *range(1, 12)))
    assert list(ranks_of(model).values()) == list(range(1, 12))


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
