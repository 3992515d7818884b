"""DiffoRA-style selection: what is searched, chosen, begun anew, and left."""

import logging

import pytest
import torch
from transformers import TrainerCallback

from gelora_plugins.errors import ConfigError, MethodError
from gelora_plugins.methods.diffora import DiffoRA, best_of_each, size_of
from gelora_plugins.methods.gate_budget import strongest
from tests.support.methods import adapted, even_rows, logits, method_trainer
from tests.support.training import layers, matrices

GATES = [0.9, 0.2, 0.6, 0.1, 0.4, 0.3]  # of three modules in each of two blocks


def test_what_is_chosen_at_the_known_answers():
    assert best_of_each(GATES, ["x"] * 3 + ["y"] * 3, 1 / 3) == [True, False, False, False, True, False]
    assert strongest(GATES, [1] * 6, [10] * 6, 30) == [True, False, True, False, True, False]
    assert best_of_each(GATES, ["x"] * 3 + ["y"] * 3, 0.5) == [True, False, True, False, True, True]  # rounded up
    assert best_of_each([0.5] * 4, ["x", "y", "x", "y"], 0.5) == [True, True, False, False]  # ties: the first
    assert all(best_of_each(GATES, ["x"] * 6, 1.0))


def test_the_gradient_at_the_known_answer():
    method = DiffoRA()
    method.gates, method.sizes = torch.zeros(1), [1]
    method.pairs = [type("Pair", (), {"a": torch.zeros(1, 2)})]
    u = (torch.tensor([[0.5, 1.0]]) * torch.tensor([[1.0, 2.0]])).sum(1)
    assert u.tolist() == [2.5]
    assert method.pull_back(u).tolist() == [0.625]


def test_the_size_of_an_update_is_that_of_the_product():
    source = torch.Generator().manual_seed(0)
    b, a = torch.randn(5, 3, generator=source), torch.randn(3, 7, generator=source)
    assert size_of(b, a) == pytest.approx(float(torch.linalg.norm(b @ a)), rel=1e-5)
    assert size_of(torch.zeros(5, 3), a) == 0


class Watch(TrainerCallback):
    """The matrices and the gates after each step."""

    def __init__(self, method):
        self.method, self.matrices, self.gates = method, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.matrices.append(
            [torch.cat([raw, pair.b.T], 1) for raw, pair in zip(self.method.raw, self.method.pairs, strict=True)]
        )
        self.gates.append(self.method.gates.detach().clone())


def test_a_step_trains_matrices_or_gates_and_after_the_search_what_was_chosen(tmp_path):
    method = DiffoRA(search=5)
    watch = Watch(method)
    model = adapted()
    start = {name: value for name, value in matrices(model).items() if "lora_A" in name}
    method_trainer(model, tmp_path, method, watch, max_steps=8, weight_decay=0.1).train()
    for step in range(1, 5):
        moved = [
            not now.equal(before) for now, before in zip(watch.matrices[step], watch.matrices[step - 1], strict=True)
        ]
        if step < 4:  # the last of the search begins anew
            assert moved == [step % 2 == 0] * 9
        assert bool((watch.gates[step] != watch.gates[step - 1]).any()) == (step % 2 == 1)
    for matrix, a in zip(watch.matrices[4], start.values(), strict=True):
        assert matrix[:, : a.shape[1]].equal(a)
        assert not matrix[:, a.shape[1] :].any()
    for step in range(5, 8):
        moved = [
            not now.equal(before) for now, before in zip(watch.matrices[step], watch.matrices[step - 1], strict=True)
        ]
        assert moved == method.chosen
        assert watch.gates[step].equal(watch.gates[4])


def test_the_adapter_is_taken_off_the_others_and_the_names_are_those_that_are_left(tmp_path):
    method = DiffoRA(search=4)
    trainer = method_trainer(adapted(exclude_modules=["lm_head"]), tmp_path, method)
    trainer.train()
    left = [name.removeprefix("base_model.model.") for name in layers(trainer.model)]
    assert [name.split(".")[2] for name in left] == ["0", "0", "1", "1", "2", "2"]  # two of three in each block
    config = trainer.model.peft_config["default"]
    assert config.target_modules == set(left)
    assert [config.layers_to_transform, config.layers_pattern, config.exclude_modules] == [None] * 3
    found = dict(trainer.model.get_base_model().named_modules())
    gone = {name: found[name] for name in (f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo")}
    assert {type(module) for name, module in gone.items() if name not in left} == {torch.nn.Linear}
    assert not any(
        "lora_" in n for n, _ in trainer.model.named_parameters() if n.partition(".lora_")[0][17:] not in left
    )


@pytest.mark.parametrize("choose", ["best", "random", "worst"])
@pytest.mark.parametrize("score", ["gate", "update"])
def test_controls_choose_as_many_by_another_order(tmp_path, choose, score):
    method = DiffoRA(search=4, choose=choose, score=score)

    class Given(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # the step that ends the search trains matrices or gates, but not the order
                with torch.no_grad():
                    method.gates.copy_(torch.tensor([1.0, -1.0, 0.0] * 3) * 50)
                method.fold()

    method_trainer(adapted(), tmp_path, method, Given()).train()
    assert [sum(method.chosen[i : i + 3]) for i in (0, 3, 6)] == [2, 2, 2]
    if score == "gate":
        expected = {"best": [True, False, True] * 3, "worst": [False, True, True] * 3}
        assert choose == "random" or method.chosen == expected[choose]


def test_random_modules_go_by_the_seed_of_the_training(tmp_path):
    found = []
    for seed in (1, 1, 2):
        method = DiffoRA(search=0, choose="random")
        method_trainer(adapted(), tmp_path, method, seed=seed, max_steps=2).train()
        found.append(method.chosen)
    assert found[0] == found[1] != found[2]


def test_a_planned_method_ends_within_the_parameters_of_the_plan(tmp_path):
    costs = [sum((layer.in_features, layer.out_features)) for layer in layers(adapted()).values()]
    ranks = [3, 4, 1] * 3
    method, begin = DiffoRA(search=4).planned(ranks, costs)
    assert (method.scope, method.budget, begin) == ("all", 696, (6, 8, 2) * 3)
    pattern = {"q_proj": 6, "k_proj": 8, "down_proj": 2}
    trainer = method_trainer(adapted(rank_pattern=pattern), tmp_path, method)
    trainer.train()
    left = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert 696 - 80 < left <= 696  # the smallest module has 2 * 40


def test_the_best_checkpoint_of_the_search_leaves_all_modules_and_says_so(tmp_path, caplog):
    scores = iter([2.0, 1.0, 1.0, 1.0])
    with caplog.at_level(logging.WARNING):
        trainer = method_trainer(
            adapted(),
            tmp_path,
            DiffoRA(search=4),
            eval_dataset=even_rows(2),
            compute_metrics=lambda predictions: {"score": next(scores)},
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="score",
        )
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert len(layers(trainer.model)) == 9
    assert "diffora leaves all modules: the training ended, or the best checkpoint, which was loaded, is" in caplog.text


def test_another_adapter_on_the_modules_stays(tmp_path):
    model = adapted()
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("default")
    trainer = method_trainer(model, tmp_path, DiffoRA(search=4))
    trainer.train()
    live = logits(trainer.model)
    assert len([layer for layer in layers(trainer.model).values() if "ref" in layer.r]) == 9
    assert len([layer for layer in layers(trainer.model).values() if "default" in layer.r]) == 6
    trainer.model.set_adapter("ref")
    with trainer.model.disable_adapter():
        base = logits(trainer.model)
    assert logits(trainer.model).equal(base)  # of a fresh adapter
    assert not live.equal(base)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": -1}, "search is -1; expected a whole number of steps."),
        ({"share": 0}, "share is 0; expected a share above 0 and up to 1."),
        ({"scope": "module"}, "scope is 'module'; expected one of: block, all."),
        ({"score": "norm"}, "score is 'norm'; expected one of: gate, update."),
        ({"choose": "first"}, "choose is 'first'; expected one of: best, random, worst."),
        ({"budget": 10}, "budget is 10; expected a whole number above 0, with scope='all'."),
    ],
)
def test_options_of_the_selection_out_of_range_are_refused(options, words):
    with pytest.raises(ConfigError) as refused:
        DiffoRA(**options)
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "diffora searches for 50 steps, and the training has 8. Train for more, or set a shorter search."),
        ({"search": 8}, "diffora searches for 8 steps, and the training has 8. "),
        (
            {"budget": 39, "scope": "all", "search": 2},
            "diffora is to leave 39 LoRA parameters, and the smallest module ",
        ),
    ],
)
def test_a_selection_that_the_training_has_no_room_for_is_refused(tmp_path, options, words):
    with pytest.raises(MethodError) as refused:
        method_trainer(adapted(), tmp_path, DiffoRA(**options)).train()
    assert str(refused.value).startswith(words)
