"""`gelora probe`: hidden states of the training data -> a profile of dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gelora_plugins.cli.options import MOST_RANK, Quiet, default_of, help_of
from gelora_plugins.cli.shown import print_table, without_bars
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError, ProbeError
from gelora_plugins.mistakes import reason
from gelora_plugins.text import printable

if TYPE_CHECKING:
    from gelora_plugins.dimension.profile import DimensionProfile


_TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
}
EXAMPLES = (
    "gelora probe MODEL train.jsonl",
    "gelora probe MODEL train.jsonl --load-in-4bit --probe-samples 2048 -o profile.json",
    "gelora probe MODEL train.jsonl --sensitivity  # how much each setting matters",
)


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
    device: Annotated[
        str,
        typer.Option(help="Where the model goes: auto (an accelerator where there is one), cpu, cuda, cuda:1, mps."),
    ] = "auto",
    device_map: Annotated[
        str, typer.Option(help="How accelerate spreads a model that does not fit one device: auto, balanced.")
    ] = "",
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Load the weights as QLoRA does: 4 bits, nf4. Needs bitsandbytes.")
    ] = False,
    estimator: Annotated[str, typer.Option(help=help_of("estimator"))] = default_of("estimator"),
    pooling: Annotated[str, typer.Option(help=help_of("pooling"))] = default_of("pooling"),
    probe_samples: Annotated[int, typer.Option(help=help_of("probe_samples"))] = default_of("probe_samples"),
    probe_max_length: Annotated[int, typer.Option(help=help_of("probe_max_length"))] = default_of("probe_max_length"),
    probe_batch_size: Annotated[int, typer.Option(help=help_of("probe_batch_size"))] = default_of("probe_batch_size"),
    probe_seed: Annotated[int, typer.Option(help=help_of("probe_seed"))] = default_of("probe_seed"),
    standardise: Annotated[bool, typer.Option(help=help_of("standardise"))] = default_of("standardise"),
    target_std_error: Annotated[float | None, typer.Option(help=help_of("target_std_error"))] = default_of(
        "target_std_error"
    ),
    feature_storage: Annotated[str, typer.Option(help=help_of("feature_storage"))] = default_of("feature_storage"),
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
        typer.Option(min=1, max=MOST_RANK, help="Your own r, for --sensitivity: what the policy budget spends."),
    ] = 8,
    quiet: Quiet = False,
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
    from gelora_plugins.probe.formats import check_fields, check_place, load_rows

    # What can be wrong is looked at in the order of what the look costs, and all of it before a model is loaded.
    check_place(data)
    plugins.find("estimator", estimator)
    plugins.find("pooling", pooling)
    dataset = load_rows(data, split)
    check_fields(dataset.column_names, text_field, data)
    with without_bars(quiet):
        loaded, tokenizer = _load(model, task, dtype, _placed(device, device_map, load_in_4bit))
        rows = _prepared(dataset, loaded, tokenizer, text_field, data, probe_max_length)
        if sensitivity:
            profile = _probe_all(loaded, rows, config, rank, output, not quiet)
        else:
            profile = _probe(loaded, rows, config, not quiet)
    json_files.write_json(output, profile.to_dict())
    for note in profile.notes():
        typer.echo(printable(note))
    typer.echo(f"{profile.num_documents} documents, {profile.num_tokens} tokens, {profile.seconds:.1f} s -> {output}")


def _prepared(dataset: Any, model: Any, tokenizer: Any, text_field: str, data: str, max_length: int) -> Any:
    from gelora_plugins.integrations.own_loop import prepared_rows

    rows = prepared_rows(dataset, model, tokenizer, text_field, max_length, data)
    if hasattr(rows, "note"):
        typer.echo(rows.note)
    return rows


def _probe(model: Any, rows: Any, config: GeLoRAConfig, progress: bool) -> DimensionProfile:
    from gelora_plugins.pipeline import measure

    profile = measure(model, rows, config, progress=progress)
    for boundary, estimate in enumerate(profile.estimates):
        typer.echo(f"boundary {boundary:3d}  {estimate}")
    return profile


def _probe_all(
    model: Any, rows: Any, config: GeLoRAConfig, rank: int, output: Path, progress: bool
) -> DimensionProfile:
    from gelora_plugins import json_files
    from gelora_plugins.sensitivity import measure_sensitivity

    found = measure_sensitivity(model, rows, config, base_rank=rank, progress=progress)
    path = output.with_name("sensitivity.json")
    json_files.write_json(path, found.to_dict())
    print_table(found.table(), [*found.lines(), f"-> {path}"])
    return found.profile


def _placed(device: str, device_map: str, load_in_4bit: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained`: where the weights go, and in how many bits."""
    import torch

    from gelora_plugins.probe.loading import accelerator, four_bits

    placed: dict[str, Any] = {}
    if device_map:
        if device != "auto":
            raise ConfigError(f"--device is {device!r} and --device-map is {device_map!r}; give one of them.")
        placed["device_map"] = device_map
    else:
        placed["device_map"] = {"": device if device != "auto" else accelerator()}
    if load_in_4bit:
        placed["quantization_config"] = four_bits(torch.bfloat16)
    return placed


def _load(model: str, task: str, dtype: str, placed: dict[str, Any]) -> tuple[Any, Any]:
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
        return loader.from_pretrained(model, dtype=dtype, **placed), transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:  # a folder of files that anybody may have written
        raise ProbeError(f"{model} cannot be loaded: {reason(error)}") from error
