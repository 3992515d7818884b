"""`gelora demo`: the whole method on a packaged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gelora_plugins.cli.options import Quiet, default_of, help_of
from gelora_plugins.cli.shown import without_bars
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import GeLoRAError

EXAMPLES = (
    "gelora demo --quick",
    "gelora demo --policy budget --samples 256 -o demo",
)
# Of one core of an AMD EPYC, with other work beside it: what all runs have, such as imports and two loads of the model,
# and what comes with each passage and step. 54 with --quick.
SECONDS = 35
SECONDS_A_PASSAGE = 0.23
SECONDS_A_STEP = 2.3


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the adapter and the report.")] = Path(
        "gelora-demo"
    ),
    policy: Annotated[str, typer.Option(help=help_of("policy"))] = default_of("policy"),
    samples: Annotated[int, typer.Option(min=1, help="Passages to measure on.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10,
    quick: Annotated[
        bool, typer.Option("--quick", help="At most 64 passages and 2 steps: less than a minute of one core.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """The whole method on SmolLM2-135M: measure, choose, train a few steps, save, reload. Needs no hub."""
    if quick:
        samples, steps = min(samples, 64), min(steps, 2)
    typer.echo(f"{samples} passages to measure on and {steps} steps to train: {_time(samples, steps)} on one core.")
    with without_bars(quiet):
        run(output, policy=policy, samples=samples, steps=steps, progress=not quiet)


def _time(samples: int, steps: int) -> str:
    """What it will take on one core, the package of the model being unpacked."""
    seconds = SECONDS + samples * SECONDS_A_PASSAGE + steps * SECONDS_A_STEP
    return f"about {round(seconds, -1):.0f} seconds" if seconds < 120 else f"about {seconds / 60:.0f} minutes"


def run(
    output_dir: Path, *, policy: str = "gelora", samples: int = 512, steps: int = 10, progress: bool = True
) -> None:
    """Probe, choose, train a few steps through Trainer and the callback, save, reload, compare the loss.

    Raises:
        GeLoRAError: the model is not to be had, or the reloaded adapter gives another loss.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from gelora_plugins.demo import GET_THE_MODEL, MODEL, passages, smollm2
    from gelora_plugins.integrations.transformers import GeLoRACallback

    try:
        source = smollm2()
        tokenizer = AutoTokenizer.from_pretrained(source)
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ImportError) as error:
        raise GeLoRAError(
            f"{MODEL} is neither installed nor on the hub from here. Get it with: {GET_THE_MODEL}"
        ) from error
    rows = passages(tokenizer, samples)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to=[],
            disable_tqdm=not progress,
        ),
        train_dataset=rows,
        callbacks=[GeLoRACallback(GeLoRAConfig(policy=policy, probe_samples=samples))],
    )
    trainer.train()
    adapter = output_dir / "adapter"
    trainer.save_model(str(adapter))
    batch = {name: torch.tensor([row[name] for row in rows[:4]]) for name in ("input_ids", "labels")}
    trained = _loss(model, batch)
    del trainer, model, base  # two copies of the base model at a time would double the demo's memory
    fresh = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    untrained = _loss(fresh, batch)
    reloaded = _loss(PeftModel.from_pretrained(fresh, str(adapter)), batch)
    print(f"\nLoss on four passages: {untrained:.6f} before, {trained:.6f} trained, {reloaded:.6f} reloaded.")
    if trained != reloaded:
        raise GeLoRAError(f"The reloaded adapter gives the loss {reloaded}, the trained one gave {trained}.")
    print(f"Adapter: {adapter}. Table, plan and picture: {output_dir / 'gelora'}.")


def _loss(model: Any, batch: dict[str, Any]) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        return float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss)
