"""`gelora compare`: what a plan is worth at equal parameters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gelora_plugins.cli.options import Quiet, listed
from gelora_plugins.errors import ConfigError

EXAMPLES = (
    "gelora compare MODEL train.jsonl --task classification --rows-per-seed 600",
    "gelora compare MODEL train.jsonl --task classification --allocations uniform --methods lora --headroom 18",
    "gelora compare MODEL train.jsonl --test test.jsonl --task causal-lm --plan plan.json --jobs 2",
)


def compare(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the pretrained model.")],
    data: Annotated[str, typer.Argument(help="JSONL, Parquet or CSV file, or hub id, of the training data.")],
    task: Annotated[str, typer.Option(help="classification, regression or causal-lm.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the comparison; a run that is recorded there is kept.")
    ] = Path("comparison"),
    test: Annotated[str | None, typer.Option(help="Test rows; a fifth of DATA if not given.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the task, and of its folder; that of the file if not given.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="accuracy, mcc, f1; spearman; token_accuracy, exact_match; loss; or package.module:function, of this "
            "folder too. The task's usual one if not given."
        ),
    ] = "",
    plan: Annotated[list[Path] | None, typer.Option(help="Saved plans to compare, instead of GeLoRA's.")] = None,
    allocations: Annotated[
        str, typer.Option(help="Which ranks, with commas: plan, uniform, permuted, reversed, grid, rate_only.")
    ] = "plan,uniform,permuted,reversed,grid",
    methods: Annotated[
        str, typer.Option(help="How they are trained, with commas: lora, eva, adalora, full, 'flat_lora sigma=0.1' ...")
    ] = "lora,eva,adalora,full",
    rank: Annotated[int, typer.Option(help="Your own r: the budget.")] = 8,
    alpha: Annotated[float, typer.Option(help="Your own lora_alpha.")] = 16,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or the endings of module names, with commas: q_proj,v_proj.")
    ] = "all-linear",
    grid: Annotated[str, typer.Option(help="Uniform ranks to compare with, with commas.")] = "1,2,4,8,16,32",
    headroom: Annotated[
        int,
        typer.Option(
            help="Random allocations to train at the cost of each plan, at the rates of uniform ranks: how much could "
            "be won by moving ranks; 18 say something."
        ),
    ] = 0,
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 5,
    rates: Annotated[
        str, typer.Option(help="Learning rates that each search begins with, with commas; one is not chosen but taken.")
    ] = "3e-4,1e-3,3e-3,1e-2",
    rate_seeds: Annotated[int, typer.Option(help="Seeds that choose a rate; others than those that judge.")] = 5,
    head_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the head; chosen once if not given, 0: the adapter's.")
    ] = None,
    bf16: Annotated[bool, typer.Option(help="Train and score in bfloat16 mixed precision.")] = False,
    load_in_4bit: Annotated[
        bool, typer.Option(help="Pretrained weights in 4 bits, as in QLoRA; needs bitsandbytes.")
    ] = False,
    epochs: Annotated[int, typer.Option(help="Epochs of each run.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a row; what is longer is cut there.")] = 128,
    train_rows: Annotated[int | None, typer.Option(help="How many training rows to draw; all if not given.")] = None,
    rows_per_seed: Annotated[
        int | None, typer.Option(help="How many of the training rows each seed draws for itself; all if not given.")
    ] = None,
    test_rows: Annotated[int | None, typer.Option(help="How many test rows to draw; all if not given.")] = None,
    margin: Annotated[
        float, typer.Option(help="Methods are equal where they differ by no more, with 95 % confidence; in hundredths.")
    ] = 0.0,
    jobs: Annotated[
        int, typer.Option(help="Runs at the same time, on the device that the Trainer takes (CUDA_VISIBLE_DEVICES).")
    ] = 1,
    quiet: Quiet = False,
) -> None:
    """Compare: allocations of ranks, and ways of training them, at equal parameters, on your model and data."""
    from dataclasses import replace

    from gelora_plugins.probe.formats import check_place

    for place in (data, *([test] if test else [])):
        check_place(place)  # before torch is loaded
    from gelora_plugins.compare.bench import Settings
    from gelora_plugins.compare.run import compare as run
    from gelora_plugins.compare.task import load_task
    from gelora_plugins.ranks.plan import RankPlan

    if ":" in metric:
        sys.path.insert(0, "")  # a script's own folder is there, not the one that it is called from
    settings = Settings(rank, alpha, target_modules, listed(allocations, str), listed(methods, str))
    settings = replace(settings, grid=listed(grid, int), seeds=seeds, rates=listed(rates, float))
    settings = replace(settings, rate_seeds=rate_seeds, head_rate=head_rate, rows_per_seed=rows_per_seed, epochs=epochs)
    settings = replace(settings, batch_size=batch_size, margin=margin, bf16=bf16, headroom=headroom)
    settings = replace(settings, load_in_4bit=load_in_4bit or None)
    sizes: dict[str, Any] = {"max_length": max_length, "train_rows": train_rows, "test_rows": test_rows}
    plans = _by_name(plan, RankPlan.load) if plan else None
    loaded = load_task(name or Path(data).name.lstrip(".").split(".")[0], task, data, test, metric=metric, **sizes)
    found = run(model, loaded, output, settings, plans=plans, jobs=jobs, progress=not quiet)
    typer.echo(found.table(loaded.name))
    for line in found.lines():
        typer.echo(line)
    for path in found.write(output):
        typer.echo(f"-> {path}")
    if any(gap.unfinished and gap.task == loaded.name for gap in found.gaps):
        raise typer.Exit(1)


def _by_name(files: list[Path], load: Any) -> dict[str, Any]:
    """What is loaded from files, by their names without the ending."""
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            raise ConfigError(
                f"Two plans are called {path.stem!r}: {found[path.stem]} and {path}. Copy one to a file of another "
                "name; the name of the file is that of its row."
            )
        found[path.stem] = path
    return {name: load(path) for name, path in found.items()}
