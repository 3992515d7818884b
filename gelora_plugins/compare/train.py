"""One run of a comparison: a fresh model, an adapter by its recipe, transformers' own Trainer, a score."""

from __future__ import annotations

import gc
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from gelora_plugins.compare.allocations import lora
from gelora_plugins.compare.bench import HEADS, Bench, peak_memory, quiet, reset_peak_memory
from gelora_plugins.compare.scoring import constant_loss, evaluate
from gelora_plugins.compare.task import split_fifth
from gelora_plugins.errors import PlanError
from gelora_plugins.findings.arms import TOLERANCE, Recipe
from gelora_plugins.findings.record import Run
from gelora_plugins.methods.base import TrainingMethod
from gelora_plugins.methods.by_name import make_method

PLAIN = ("lora", "eva", "full")  # what needs no training method
RHO = 2.0  # EVA may give a module up to this many times its even share; the best value of its paper
EVA_ROUNDS = 5
logger = logging.getLogger(__name__)


def attempt(bench: Bench, made: Run, threads: int | None = None) -> dict[str, Any] | str:
    """The result of a run, see `run`, or why it failed, whatever it was: one that fails is not to end the others.

    Args:
        threads: of torch in this process; as they are if None.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return run(bench, made)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["it says no more"]
        reason = f"{type(error).__name__}: {lines[0].rstrip('.')}."
        logger.warning("%s failed: %s", made, reason, exc_info=logger.isEnabledFor(logging.DEBUG))
    gc.collect()  # the model and its Trainer refer to each other, and the next run wants their memory
    return reason


def run(bench: Bench, made: Run) -> dict[str, Any]:
    """Train a recipe once and score it on the test rows, or on those that are held out where it is to choose a rate.

    Its seed is that of the head, the adapter, the rows drawn and held out, their order and dropout. A run that chooses
    makes as many steps as one for the result: the best rate depends on their number.

    Returns:
        score and loss (None where they are no numbers), constant_loss (of the constant answer; of a causal-lm that of
        the model before training), seconds (of the training alone), peak_memory (bytes: of the accelerator, else of the
        process; None where that cannot be known), lora_parameters and head_parameters (counted on the trained model),
        parts (what each test row adds to the score; not of a run that chooses).

    Raises:
        PlanError: the trained model has not the LoRA parameters that were planned.
    """
    drawn, recipe = bench.drawn(made.seed), made.recipe
    rows, scored = split_fifth(drawn, made.seed % 5) if made.choosing else (drawn, bench.test)
    reset_peak_memory()
    steps = total_steps(bench, len(drawn))
    method, first = method_of(bench, recipe)
    model = adapted(bench, replace(recipe, ranks=first), made.seed)
    constant = _constant(bench, model, rows, scored)
    seconds = fit(bench, model, made, rows, steps, method)
    lora = _count(model, recipe)
    if abs(lora - recipe.parameters) >= TOLERANCE * recipe.parameters:
        raise PlanError(
            f"The trained {recipe.kind} has {lora:,} LoRA parameters; {recipe.parameters:,} were planned, and arms are "
            "compared at equal parameters. Give the method options with which it keeps them."
        )
    score, loss, parts = _evaluate(bench, model, scored, bench.task.metric)
    return {
        "score": score if math.isfinite(score) and math.isfinite(loss) else None,  # argmax makes 0 of NaN: an answer
        "loss": loss if math.isfinite(loss) else None,
        "constant_loss": constant if math.isfinite(constant) else None,
        "seconds": seconds,
        "peak_memory": peak_memory(),
        "lora_parameters": lora,
        "head_parameters": 0 if recipe.kind == "full" else sum(p.numel() for p in head_of(model)),
        **({} if made.choosing or not np.isfinite(parts).all() else {"parts": [float(f"{x:.6g}") for x in parts]}),
    }


def _evaluate(
    bench: Bench, model: Any, rows: Sequence[Mapping[str, Any]], metric: str
) -> tuple[float, float, list[float]]:
    size, bf16 = 4 * bench.settings.batch_size, bench.settings.bf16
    return evaluate(model, rows, bench.collator, metric, size, bf16=bf16, tokenizer=bench.tokenizer)


def _constant(
    bench: Bench, untrained: Any, rows: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]
) -> float:
    """The loss on `scored` that a run must get below: of the constant answer, of a causal-lm of the model as it was."""
    kind = bench.task.kind
    return _evaluate(bench, untrained, scored, "loss")[1] if kind == "causal-lm" else constant_loss(kind, rows, scored)


def method_of(bench: Bench, recipe: Recipe) -> tuple[TrainingMethod | None, tuple[int, ...]]:
    """(the training method of a recipe, None where it is none of ours; the ranks that it begins with)."""
    if recipe.kind in PLAIN:
        return None, recipe.ranks
    return make_method(recipe.kind).planned(recipe.ranks, [site.parameters_per_rank for site in bench.sites])


def chooses_ranks(kind: str) -> bool:
    """Whether a method decides itself which ranks stay, so that the ranks it begins with are a budget alone."""
    return kind not in PLAIN and make_method(kind).chooses_ranks


def first_parameters(bench: Bench, recipe: Recipe) -> int:
    """LoRA parameters that a recipe begins with."""
    return lora(method_of(bench, recipe)[1], bench.sites).parameters if recipe.ranks else recipe.parameters


def fit(
    bench: Bench,
    model: Any,
    made: Run,
    rows: Sequence[Mapping[str, Any]],
    steps: int,
    method: TrainingMethod | None = None,
) -> float:
    """Train `model` on encoded rows, see `run`; the seconds that it took."""
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(bench, scratch, made.seed, made.rate, steps)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=bench.collator,
            callbacks=[] if method is None else [method],
            optimizers=(_optimizer(model, arguments, made.head_rate), None),
        )
        trainer.remove_callback(PrinterCallback)  # the bar of the comparison says enough
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


def _optimizer(model: Any, arguments: TrainingArguments, head_rate: float | None) -> Any:
    """The Trainer's own optimizer with the head in a group of its own; None, so that it makes one itself, for one rate.

    Weight decay is 0, so the Trainer's own groups do not differ.
    """
    head = head_of(model)
    if head_rate is None or not head:
        return None
    ours = {id(p) for p in head}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return kind([{"params": others}, {"params": head, "lr": head_rate}], **options)


def head_of(model: Any) -> list[torch.nn.Parameter]:
    """What is trained beside the adapter; of a model without an adapter, what would be."""
    peft = any(".lora_" in name for name, _ in model.named_parameters())
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and (".modules_to_save." in name if peft else set(HEADS) & set(name.split(".")))
    ]


def total_steps(bench: Bench, num_rows: int) -> int:
    """Optimizer steps of a run for the result on `num_rows` rows."""
    return bench.settings.epochs * math.ceil(num_rows / bench.settings.batch_size)


def _arguments(bench: Bench, scratch: str, seed: int, rate: float, steps: int) -> TrainingArguments:
    return TrainingArguments(
        scratch,
        max_steps=steps,
        per_device_train_batch_size=bench.settings.batch_size,
        learning_rate=rate,
        warmup_steps=bench.settings.warmup,
        bf16=bench.settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # without it transformers 5 looks for a GPU that has bfloat16
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="group_by_length",  # padding would be half of the work
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def adapted(bench: Bench, recipe: Recipe, seed: int) -> Any:
    """A fresh model with the untrained adapter of `recipe`."""
    model = bench.load(seed)
    if recipe.kind == "full":
        return model
    torch.manual_seed(seed)
    if recipe.kind == "eva":
        return _with_eva(bench, model, recipe.budget)
    ranks = {site.pattern: rank for site, rank in zip(bench.sites, recipe.ranks, strict=True)}
    factors = recipe.scalings or (1,) * len(recipe.ranks)
    alphas = {
        site.pattern: rank * bench.settings.scaling * factor
        for site, rank, factor in zip(bench.sites, recipe.ranks, factors, strict=True)
    }
    alphas = {} if recipe.keep_alpha else alphas
    return get_peft_model(model, LoraConfig(**_common(bench), rank_pattern=ranks, alpha_pattern=alphas))


def _common(bench: Bench) -> dict[str, Any]:
    return {
        "target_modules": list(bench.targets),
        "task_type": "CAUSAL_LM" if bench.task.kind == "causal-lm" else "SEQ_CLS",
        "r": bench.settings.rank,
        "lora_alpha": bench.settings.lora_alpha,
    }


def _with_eva(bench: Bench, model: Any, budget: int) -> Any:
    """The base's LoRA with the components that `measure_eva` kept; PEFT sets ranks and keeps the scaling."""
    config = LoraConfig(**_common(bench), init_lora_weights="eva", eva_config=EvaConfig(rho=RHO))
    wrapped = get_peft_model(model, config)
    state = {f"base_model.model.{name}": components for name, components in _eva(bench, budget)["state"].items()}
    initialize_lora_eva_weights(wrapped, eva_state_dict=state)
    return wrapped


def measure_eva(bench: Bench, parameters: int) -> tuple[Recipe, dict[str, int], float]:
    """EVA at `parameters` LoRA parameters, measured once on the training rows: recipe, rank per module, seconds.

    EVA spends a number of ranks, not of parameters. Where target modules differ in size, that number is adjusted
    until the parameters agree to 1 %. What was measured is kept in `bench.cache`.

    Raises:
        PlanError: they do not agree after a few rounds.
    """
    costs = {name: linear.in_features + linear.out_features for name, linear in bench.targets.items()}
    budget = max(len(costs), round(parameters * len(costs) / sum(costs.values())))
    cost = 0
    for _ in range(EVA_ROUNDS):
        kept = _eva(bench, budget)
        ranks = {name: len(components) for name, components in kept["state"].items()}
        cost = sum(rank * costs[name] for name, rank in ranks.items())
        if abs(cost - parameters) < TOLERANCE * parameters:
            return Recipe("eva", cost, budget=budget), ranks, kept["seconds"]
        budget = max(len(costs), round(budget * parameters / cost))
    raise PlanError(
        f"EVA comes to {cost:,} LoRA parameters where {parameters:,} were asked for. Adapt target modules of one size, "
        "or leave EVA out."
    )


def _eva(bench: Bench, budget: int) -> dict[str, Any]:
    """{"state": components (rank, in_features) float32 per module, "seconds"} at `budget` ranks in all; kept."""
    path = bench.cache / f"eva-{budget}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {"state": state, "seconds": float(file.metadata()["seconds"])}
    low, left = divmod(budget, len(bench.targets))
    ranks = {name.replace(".", r"\."): low + (i < left) for i, name in enumerate(bench.targets)}
    config = LoraConfig(**_common(bench), rank_pattern=ranks, init_lora_weights="eva", eva_config=EvaConfig(rho=RHO))
    rows: Any = bench.train
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_size=bench.settings.batch_size,
        shuffle=True,
        drop_last=len(bench.train) >= bench.settings.batch_size,
        generator=torch.Generator().manual_seed(0),
        collate_fn=_Inputs(bench),
    )
    model = bench.load(0)
    started = time.perf_counter()
    state = get_eva_state_dict(model, loader, config, show_progress_bar=False)
    seconds = time.perf_counter() - started
    bench.cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    state = {name: components.contiguous() for name, components in state.items()}
    save_file(state, temporary, metadata={"seconds": str(seconds)})
    temporary.replace(path)
    return {"state": state, "seconds": seconds}


class _Inputs:
    """Batches for EVA: PEFT 0.21 takes `labels` for labels of tokens, so those of rows stay out."""

    def __init__(self, bench: Bench) -> None:
        self.collator = bench.collator

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        return batch if self.collator.kind == "causal-lm" else {k: v for k, v in batch.items() if k != "labels"}


def _count(model: Any, recipe: Recipe) -> int:
    """LoRA parameters of the trained model; of "full" all of them."""
    return sum(p.numel() for name, p in model.named_parameters() if recipe.kind == "full" or ".lora_" in name)
