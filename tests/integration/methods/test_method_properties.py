"""What holds for every training method: it starts at the base model, resumes, and ends as plain LoRA."""

import math
from pathlib import Path

import pytest
import torch

from gelora_plugins.methods.base import SIDECAR
from gelora_plugins.methods.flat_lora import FlatLoRA
from gelora_plugins.ranks.export import export_uniform
from tests.support import groups
from tests.support.forks import run_together, said
from tests.support.methods import (
    METHODS,
    NEUTRAL,
    STEPS,
    Seen,
    adapted,
    even_rows,
    loaded,
    logits,
    method_trainer,
)
from tests.support.training import layers, losses, matrices

EACH = pytest.mark.parametrize("name", METHODS)
SAVING = {"save_strategy": "steps", "save_steps": 2}


@EACH
def test_the_first_step_is_that_of_the_base_model_and_training_moves_it(tmp_path: Path, name: str) -> None:
    seen = Seen()
    trainer = method_trainer(adapted(), tmp_path, METHODS[name](), seen)
    trainer.train()
    assert seen.first.equal(seen.base)
    assert not logits(trainer.model).equal(seen.base)
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_setting_is_plain_lora_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Dropout's masks are the same, too: no method draws from the global generator."""
    trained = []
    for callbacks in ([NEUTRAL[name]()], []):
        trainer = method_trainer(adapted(lora_dropout=0.1), tmp_path, *callbacks, max_grad_norm=0.0)
        trainer.train()
        trained.append((matrices(trainer.model), losses(trainer)))
    (ours, our_losses), (plain, plain_losses) = trained
    assert our_losses == plain_losses
    assert all(ours[key].equal(plain[key]) for key in plain)


@EACH
@pytest.mark.parametrize("rslora", [False, True])
def test_the_saved_adapter_is_plain_lora_with_the_live_logits(tmp_path: Path, name: str, rslora: bool) -> None:
    trainer = method_trainer(adapted(use_rslora=rslora), tmp_path, METHODS[name]())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    live = logits(trainer.model)
    assert not (tmp_path / "adapter" / SIDECAR).exists()
    # The scaling is alpha / r of other numbers, so it may differ in the last of 53 bits.
    torch.testing.assert_close(logits(loaded(tmp_path / "adapter")), live, atol=1e-6, rtol=1e-6)
    export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    torch.testing.assert_close(logits(loaded(tmp_path / "uniform")), live, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(trainer.model.merge_and_unload()), live, atol=1e-5, rtol=1e-5)


@EACH
def test_matrices_in_half_precision_are_saved_as_they_are(tmp_path: Path, name: str) -> None:
    """PEFT makes them so with autocast_adapter_dtype=False, and keeps float32 otherwise."""
    model = adapted()
    for matrix in (p for p in model.parameters() if p.requires_grad):
        matrix.data = matrix.data.bfloat16()
    seen = Seen()
    trainer = method_trainer(model, tmp_path, METHODS[name](), seen)
    trainer.train()
    assert seen.first.equal(seen.base)
    assert not logits(trainer.model).equal(seen.base)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    trainer.save_model(str(tmp_path / "adapter"))
    again = matrices(loaded(tmp_path / "adapter"))
    assert all(value.float().equal(again[key].float()) for key, value in matrices(trainer.model).items())


@EACH
def test_a_checkpoint_is_plain_lora_with_the_logits_of_its_step(tmp_path: Path, name: str) -> None:
    class Watch(Seen):
        def on_save(self, args, state, control, model=None, **kwargs):
            said_now[state.global_step] = logits(model)

    said_now: dict[int, torch.Tensor] = {}
    trainer = method_trainer(adapted(), tmp_path, METHODS[name](), Watch(), **SAVING)
    trainer.train()
    assert sorted(said_now) == [2, 4, 6, 8]
    for step, live in said_now.items():
        assert logits(loaded(tmp_path / f"checkpoint-{step}")).equal(live)
        args = torch.load(tmp_path / f"checkpoint-{step}" / "training_args.bin", weights_only=False)
        assert args.max_grad_norm == 1.0


@EACH
@pytest.mark.parametrize(("step", "bf16"), [(2, False), (3, False), (7, False), (3, True)])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, name: str, step: int, bf16: bool
) -> None:
    """Both do the same operations on the same numbers in the same order."""
    whole, resumed = (
        method_trainer(
            adapted(lora_dropout=0.1),
            directory,
            METHODS[name](),
            weight_decay=0.1,
            save_strategy="steps",
            save_steps=1,
            bf16=bf16,
        )
        for directory in (tmp_path, tmp_path / "again")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert losses(resumed) == losses(whole)
    expected = matrices(whole.model)
    found = matrices(resumed.model)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(expected[key]) for key in expected)


@EACH
def test_the_best_checkpoint_is_what_is_left_where_that_was_asked_for(tmp_path: Path, name: str) -> None:
    scores = iter([0.0, 2.0, 1.0, 0.5])  # of step 2, 4, 6 and 8
    trainer = method_trainer(
        adapted(),
        tmp_path,
        METHODS[name](),
        eval_dataset=even_rows(2),
        compute_metrics=lambda predictions: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **SAVING,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = logits(loaded(tmp_path / "checkpoint-4"))
    # Ranks of zeros may be gone: sums of other lengths.
    torch.testing.assert_close(logits(trainer.model), best, atol=1e-6, rtol=1e-6)


@EACH
def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path: Path, name: str) -> None:
    """SGD moves a matrix by the rounding of its gradient, and no gate has a gradient that is nothing else; the sums of
    a step differ by some 1e-7 of themselves."""
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = method_trainer(
            adapted(),
            tmp_path,
            METHODS[name](),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        trainer.train()
        found.append(matrices(trainer.model))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=1e-6, rtol=1e-5)


@EACH
def test_two_processes_train_as_one_does(tmp_path: Path, name: str) -> None:
    for count in (1, 2):
        directory = tmp_path / str(count)
        directory.mkdir()
        codes = run_together(directory, count, groups.train_method, name)
        assert codes == [0] * count, said(directory).read_text()
    alone, first, second = (torch.load(tmp_path / place) for place in ("1/found-0.pt", "2/found-0.pt", "2/found-1.pt"))
    assert alone.keys() == first.keys()
    for key, value in alone.items():
        assert first[key].equal(second[key])
        torch.testing.assert_close(first[key], value, atol=1e-6, rtol=1e-5)


@EACH
def test_training_ends_with_hooks_and_arguments_as_they_were(tmp_path: Path, name: str) -> None:
    trainer = method_trainer(adapted(), tmp_path, METHODS[name](), max_grad_norm=0.25)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.25
    assert not any(module._forward_hooks for module in trainer.model.modules())
    assert all(layer.lora_A["default"].out_features == layer.r["default"] for layer in layers(trainer.model).values())
    assert len(losses(trainer)) == STEPS


class Failing(Seen):
    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)

    def _fail(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise RuntimeError("stopped by the user")


@EACH
@pytest.mark.parametrize("event", ["on_substep_end", "on_optimizer_step", "on_step_end"])
def test_a_training_that_fails_gives_back_what_it_borrowed(tmp_path: Path, name: str, event: str) -> None:
    trainer = method_trainer(
        adapted(),
        tmp_path,
        METHODS[name](),
        Failing(event),
        max_grad_norm=0.25,
        gradient_accumulation_steps=2,
    )
    with pytest.raises(RuntimeError, match="stopped by the user"):
        trainer.train()
    assert trainer.args.max_grad_norm == 0.25
    assert not any(module._forward_hooks for module in trainer.model.modules())


@EACH
def test_flat_lora_goes_beside_it(tmp_path: Path, name: str) -> None:
    """In either order: the noise follows the folded matrices, which the model holds when it is drawn."""
    trained = []
    for callbacks in ([METHODS[name]()], [METHODS[name](), FlatLoRA(0.3)], [FlatLoRA(0.3), METHODS[name]()]):
        trainer = method_trainer(adapted(), tmp_path, *callbacks)
        trainer.train()
        trained.append((matrices(trainer.model), losses(trainer)))
    (_, alone), (flat, noisy), (other_way, _) = trained
    assert all(flat[key].equal(other_way[key]) for key in flat)
    assert noisy[0] == alone[0]
    assert noisy[1] != alone[1]
