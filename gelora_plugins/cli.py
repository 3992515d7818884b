"""The command `gelora`. Heavy imports stand inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError, LayoutError, ProbeError
from gelora_plugins.mistakes import reason, sentence
from gelora_plugins.text import printable

if TYPE_CHECKING:
    from gelora_plugins.dimension.profile import DimensionProfile

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Choose LoRA ranks from the geometry of your data in your model.\n\n"
    "[bold]gelora demo[/] shows all of it on a small real model. For your own: [bold]gelora probe[/] measures, "
    "[bold]gelora plan[/] chooses ranks from what was measured, [bold]gelora report[/] shows them. Most people need "
    "none of these: add GeLoRACallback() to your Trainer and train.",
)

_MOST_RANK = 2**16  # no linear map that is trained today has a longer side
_OPTIONS = {field.name: field for field in fields(GeLoRAConfig)}
_TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
}


def _help(name: str) -> str:
    return str(_OPTIONS[name].metadata["help"]).replace("`", "")


def _default(name: str) -> Any:
    return _OPTIONS[name].default


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"gelora {version('gelora')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the adapter and the report.")] = Path(
        "gelora-demo"
    ),
    policy: Annotated[str, typer.Option(help=_help("policy"))] = _default("policy"),
    samples: Annotated[int, typer.Option(min=1, help="Passages to measure on.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10,
) -> None:
    """The whole method on SmolLM2-135M: measure, choose, train a few steps, save, reload. Needs no hub."""
    from gelora_plugins.demo import run

    run(output, policy=policy, samples=samples, steps=steps)


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Directory or hub id of the pretrained model.")],
    data: Annotated[str, typer.Argument(help="JSONL, Parquet or CSV file, or hub id, of the training data.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")] = Path("profile.json"),
    task: Annotated[
        str, typer.Option(help=f"Head that the model will be trained with: auto, {', '.join(_TASKS)}.")
    ] = "auto",
    split: Annotated[str, typer.Option(help="Split of a hub dataset.")] = "train",
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    dtype: Annotated[str, typer.Option(help="Type of the weights: auto, float32, bfloat16, float16.")] = "auto",
    estimator: Annotated[str, typer.Option(help=_help("estimator"))] = _default("estimator"),
    pooling: Annotated[str, typer.Option(help=_help("pooling"))] = _default("pooling"),
    probe_samples: Annotated[int, typer.Option(help=_help("probe_samples"))] = _default("probe_samples"),
    probe_max_length: Annotated[int, typer.Option(help=_help("probe_max_length"))] = _default("probe_max_length"),
    probe_batch_size: Annotated[int, typer.Option(help=_help("probe_batch_size"))] = _default("probe_batch_size"),
    probe_seed: Annotated[int, typer.Option(help=_help("probe_seed"))] = _default("probe_seed"),
    standardise: Annotated[bool, typer.Option(help=_help("standardise"))] = _default("standardise"),
    target_std_error: Annotated[float | None, typer.Option(help=_help("target_std_error"))] = _default(
        "target_std_error"
    ),
    feature_storage: Annotated[str, typer.Option(help=_help("feature_storage"))] = _default("feature_storage"),
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Show how the plan changes with estimator, pooling, rounding, number and choice of documents; one "
            "forward pass for all. sensitivity.json goes beside the profile. Reads all of probe_samples.",
        ),
    ] = False,
    rank: Annotated[
        int,
        typer.Option(min=1, max=_MOST_RANK, help="Your own r, for --sensitivity: what the policy budget spends."),
    ] = 8,
) -> None:
    """Measure: hidden states of DATA in MODEL -> intrinsic dimension at every block boundary."""
    config = GeLoRAConfig(
        estimator=estimator,
        pooling=pooling,
        probe_samples=probe_samples,
        probe_max_length=probe_max_length,
        probe_batch_size=probe_batch_size,
        probe_seed=probe_seed,
        standardise=standardise,
        target_std_error=target_std_error,
        feature_storage=feature_storage,
    )
    from gelora_plugins import json_files, plugins

    plugins.find("estimator", estimator)
    plugins.find("pooling", pooling)
    from gelora_plugins.probe.formats import load_rows

    dataset = load_rows(data, split)  # a file that cannot be read must not cost the loading of a model
    loaded, tokenizer = _load(model, task, dtype)
    rows = _prepared(dataset, loaded, tokenizer, text_field, data, probe_max_length)
    profile = _probe_all(loaded, rows, config, rank, output) if sensitivity else _probe(loaded, rows, config)
    json_files.write_json(output, profile.to_dict())
    for note in profile.notes():
        typer.echo(printable(note))
    typer.echo(f"{profile.num_documents} documents, {profile.num_tokens} tokens, {profile.seconds:.1f} s -> {output}")


def _prepared(dataset: Any, model: Any, tokenizer: Any, text_field: str, data: str, max_length: int) -> Any:
    """The rows with token ids: as TRL would train on them, where they are of a kind that it trains on."""
    from gelora_plugins.probe.formats import TokenisedRows, are_for_trl

    # TRL trains causal models, and takes no tokenizer without an end of text (trl 1.16).
    writes = model.can_generate() and not model.config.is_encoder_decoder and tokenizer.eos_token is not None
    if not are_for_trl(dataset.column_names, text_field if writes else None, find_spec("trl") is not None):
        return TokenisedRows(dataset, tokenizer, text_field, data)
    from gelora_plugins.integrations.trl_rows import TrlRows

    rows = TrlRows(dataset, tokenizer, text_field, max_length, data)
    typer.echo(rows.note)
    return rows


def _probe(model: Any, rows: Any, config: GeLoRAConfig) -> DimensionProfile:
    from gelora_plugins.pipeline import measure

    profile = measure(model, rows, config, progress=sys.stderr.isatty())
    for boundary, estimate in enumerate(profile.estimates):
        typer.echo(f"boundary {boundary:3d}  {estimate}")
    return profile


def _probe_all(model: Any, rows: Any, config: GeLoRAConfig, rank: int, output: Path) -> DimensionProfile:
    from gelora_plugins import json_files
    from gelora_plugins.sensitivity import measure_sensitivity

    found = measure_sensitivity(model, rows, config, base_rank=rank, progress=sys.stderr.isatty())
    path = output.with_name("sensitivity.json")
    json_files.write_json(path, found.to_dict())
    _print(found.table(), [*found.lines(), f"-> {path}"])
    return found.profile


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(help="What gelora probe wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.json"),
    policy: Annotated[str, typer.Option(help=_help("policy"))] = _default("policy"),
    rounding: Annotated[str, typer.Option(help=_help("rounding"))] = _default("rounding"),
    rank: Annotated[
        int, typer.Option(min=1, max=_MOST_RANK, help="Your own r: the budget, and what the scaling is measured by.")
    ] = 8,
    alpha: Annotated[float, typer.Option(help="Your own lora_alpha.")] = 16,
    rslora: Annotated[bool, typer.Option(help="Rank-stabilised LoRA: scaling is alpha / sqrt(r).")] = False,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or the endings of module names, with commas: q_proj,v_proj.")
    ] = "all-linear",
) -> None:
    """Choose: a profile -> one rank per block, for LoraConfig or GeLoRACallback(plan=...). Needs no model."""
    from gelora_plugins import json_files
    from gelora_plugins.dimension.profile import DimensionProfile
    from gelora_plugins.ranks.plan import layout_sites
    from gelora_plugins.ranks.policies import make_plan

    measured = DimensionProfile.from_dict(json_files.read_json(profile))
    names = [name.strip() for name in target_modules.split(",")]
    sites = layout_sites(
        measured.layout,
        lambda path: names == ["all-linear"] or any(path == name or path.endswith(f".{name}") for name in names),
    )
    if not sites:
        raise LayoutError(f"No linear map in the blocks of {profile} ends in any of: {', '.join(names)}.")
    chosen = make_plan(
        measured, GeLoRAConfig(policy=policy, rounding=rounding), sites, rank, lora_alpha=alpha, use_rslora=rslora
    )
    chosen.save(output)
    _show(chosen)
    typer.echo(f"-> {output}")


@app.command()
def report(
    plan: Annotated[Path, typer.Argument(help="What gelora plan, or a training, wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for report.md, report.json and ranks.png.")
    ] = None,
) -> None:
    """Show: the table of a plan, and with -o the files."""
    from gelora_plugins.ranks.plan import RankPlan
    from gelora_plugins.report.rank_report import RankReport

    loaded = RankPlan.load(plan)
    _show(loaded)
    if output is not None:
        for path in RankReport(loaded).write(output):
            typer.echo(f"-> {path}")


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Directory of a saved PEFT LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="New directory for the adapter that servers read.")],
    uniform: Annotated[
        bool, typer.Option("--uniform", help="One rank for all modules: the one kind there is.")
    ] = False,
    rank_multiple: Annotated[int, typer.Option(help="Round the rank up to a multiple of this.")] = 1,
) -> None:
    """Serve: an adapter of many ranks -> the same adapter with one, for SGLang, llama.cpp, Ollama. Needs no model."""
    if not uniform:
        raise ConfigError(
            "gelora export writes one kind of adapter so far; say which: gelora export ADAPTER OUT --uniform."
        )
    from gelora_plugins.ranks.export import export_uniform

    done = export_uniform(adapter, out, rank_multiple=rank_multiple)
    typer.echo(f"{done.num_modules} modules with rank {done.rank} and lora_alpha {done.lora_alpha:g} -> {out}")
    if done.folded:
        typer.echo(f"The scaling of {len(done.folded)} modules differed and is in their lora_B now.")


@app.command()
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
    metric: Annotated[str, typer.Option(help="accuracy, mcc, f1, spearman or loss; the task's usual one.")] = "",
    plan: Annotated[list[Path] | None, typer.Option(help="Saved plans to compare, instead of GeLoRA's.")] = None,
    methods: Annotated[str, typer.Option(help="Which of them, with commas; all if not given.")] = "",
    rank: Annotated[int, typer.Option(help="Your own r: the budget.")] = 8,
    alpha: Annotated[float, typer.Option(help="Your own lora_alpha.")] = 16,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or the endings of module names, with commas: q_proj,v_proj.")
    ] = "all-linear",
    grid: Annotated[str, typer.Option(help="Uniform ranks to compare with, with commas.")] = "1,2,4,8,16,32",
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 5,
    rates: Annotated[
        str, typer.Option(help="Learning rates that each search begins with, with commas; one is not chosen but taken.")
    ] = "3e-4,1e-3,3e-3,1e-2",
    rate_seeds: Annotated[int, typer.Option(help="Seeds that choose a rate; others than those that judge.")] = 5,
    head_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the head; chosen once if not given, 0: the adapter's.")
    ] = None,
    bf16: Annotated[bool, typer.Option(help="Train and score in bfloat16 mixed precision.")] = False,
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
    jobs: Annotated[int, typer.Option(help="Runs at the same time.")] = 1,
) -> None:
    """Compare: GeLoRA, uniform, permuted, EVA, AdaLoRA at equal parameters, on your model and data."""
    from dataclasses import replace

    from gelora_plugins.compare.allocations import METHODS
    from gelora_plugins.compare.bench import Settings
    from gelora_plugins.compare.run import compare as run
    from gelora_plugins.compare.task import load_task
    from gelora_plugins.ranks.plan import RankPlan

    settings = Settings(
        rank, alpha, target_modules, _list(methods, str) or METHODS, _list(grid, int), seeds, _list(rates, float)
    )
    settings = replace(settings, rate_seeds=rate_seeds, head_rate=head_rate, rows_per_seed=rows_per_seed, epochs=epochs)
    settings = replace(settings, batch_size=batch_size, margin=margin, bf16=bf16)
    sizes: dict[str, Any] = {"max_length": max_length, "train_rows": train_rows, "test_rows": test_rows}
    plans = _by_name(plan, RankPlan.load) if plan else None
    loaded = load_task(name or Path(data).name.lstrip(".").split(".")[0], task, data, test, metric=metric, **sizes)
    found = run(model, loaded, output, settings, plans=plans, jobs=jobs, progress=sys.stderr.isatty())
    typer.echo(found.table(loaded.name))
    for line in found.lines():
        typer.echo(line)
    for path in found.write(output):
        typer.echo(f"-> {path}")
    if any(gap.unfinished and gap.task == loaded.name for gap in found.gaps):
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def sft(context: typer.Context) -> None:
    """TRL's SFT script with GeLoRA: its own arguments, and GeLoRA's beside them (gelora sft --help)."""
    from gelora_plugins.integrations import trl

    trl.main(context.args)


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


def _list(text: str, kind: Any) -> tuple[Any, ...]:
    """The values in `text`, which has commas between them."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of numbers with commas between them.") from error


def _show(plan: Any) -> None:
    from gelora_plugins.report.rank_report import RankReport, plan_table

    _print(plan_table(plan), RankReport(plan).lines())


def _print(table: Any, lines: list[str]) -> None:
    from gelora_plugins.report.rank_report import render

    typer.echo(render(table))
    for line in lines:
        typer.echo(printable(line))


def _load(model: str, task: str, dtype: str) -> tuple[Any, Any]:
    """The model with the head that it will be trained with (its name is in every module path), and its tokenizer."""
    import torch
    import transformers

    if task != "auto" and task not in _TASKS:
        raise ConfigError(f"--task is {task!r}; expected auto or one of: {', '.join(_TASKS)}.")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"--dtype is {dtype!r}; expected auto, float32, bfloat16 or float16.")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        (name, *_) = getattr(config, "architectures", None) or ["AutoModel"]
        loader: Any = getattr(transformers, str(name) if task == "auto" else _TASKS[task], None)
        if not hasattr(loader, "from_pretrained"):
            raise ConfigError(
                f"its config.json names the architecture {name!r}, which transformers {transformers.__version__} does "
                f"not have. Say which head it is to be trained with: --task {', '.join(_TASKS)}."
            )
        return loader.from_pretrained(model, dtype=dtype), transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:  # a folder of files that anybody may have written
        raise ProbeError(f"{model} cannot be loaded: {reason(error)}") from error


def main() -> None:
    """Run the command; a user's error is one sentence on stderr and exit code 2."""
    try:
        app()
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        typer.echo(f"gelora: {printable(said)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
