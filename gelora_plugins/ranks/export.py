"""A saved LoRA adapter with one rank for all modules, for servers that read no rank pattern. Needs no model."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gelora_plugins import json_files
from gelora_plugins.errors import ConfigError, ExportError, WriteError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT 0.21: initialisations known to leave the base weight alone. PiSSA, OLoRA, CorDA and LoftQ run again when PEFT
# loads the adapter and rewrite the base weight by the rank, so that padded matrices would be added to another one.
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
# PEFT 0.21: fields that make the update something else than scaling * B A.
VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")

MOST_MULTIPLE = 1024  # of a rank; a file of matrices padded further is a mistake
MOST = 10**9  # of r and lora_alpha
SECONDS = 1.0  # that a key of a pattern may take for one module; a sound one takes microseconds

_TENSOR = regex.compile(r"(?P<module>.+)\.lora_(?P<kind>(?:embedding_)?[AB])(?P<end>\.weight|\.bias)?")


@dataclass(frozen=True)
class UniformAdapter:
    """What was written: the rank and lora_alpha of every module, and how many modules there are.

    `folded` names the modules whose own scaling differed from lora_alpha / rank, and so was multiplied into B.
    """

    rank: int
    lora_alpha: float
    num_modules: int
    folded: tuple[str, ...]


@dataclass(frozen=True)
class _Module:
    """One pair of matrices: A (experts * rank, in, ...) and B (out, rank * experts, ...), and the keys of both.

    Attributes:
        experts: 1, or the number of experts of a fused parameter.
        scaling: what PEFT multiplies B A by.
    """

    name: str
    rank: int
    experts: int
    scaling: float
    down: str
    up: str
    bias: str | None


def export_uniform(
    adapter: str | os.PathLike[str], out: str | os.PathLike[str], *, rank_multiple: int = 1
) -> UniformAdapter:
    """Write the LoRA adapter in the directory `adapter` to the directory `out` with one rank for all modules.

    The rank is the largest there is, rounded up to `rank_multiple`. A gets rows and B columns of zeros, so that B A
    is the same. The scaling is lora_alpha / rank for all; where a module's own differs, the ratio goes into B in
    float32 or wider: exact for a power of two, else rounded to the dtype of B, which is kept. lora_alpha is whole
    unless the scalings do not allow it and B is in half precision. Patterns and rank stabilisation are gone; all
    else in the configuration and all other tensors (`modules_to_save`, biases) are kept. Other files are not copied.

    Raises:
        ConfigError: `rank_multiple` is less than 1 or more than 1,024.
        ExportError: no plain LoRA adapter in safetensors, or `out` is there and not empty. Nothing was written.
        PlanError: adapter_config.json cannot be read.
        WriteError: the disk is full, or `out` cannot be made.
    """
    source, target = Path(adapter), Path(out)
    if not 1 <= rank_multiple <= MOST_MULTIPLE:
        raise ConfigError(
            f"The rank multiple is {rank_multiple}; expected a whole number of at least 1 and at most {MOST_MULTIPLE}."
        )
    if target.is_symlink() and not target.exists():
        raise ExportError(f"{target} is a link to {target.readlink()}, which is not there; expected a new directory.")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ExportError(f"{target} is there already; expected a new or an empty directory.")
    config = _read_config(source)
    tensors, metadata = _read_tensors(source)
    modules = _modules(tensors, config)
    rank = -(-max(module.rank for module in modules) // rank_multiple) * rank_multiple
    alpha = _alpha(modules, rank, tensors)
    folded = []
    for module in modules:
        ratio = module.scaling * rank / alpha
        if not math.isclose(ratio, 1.0, rel_tol=1e-9):
            folded.append(module.name)
            for key in (module.up, module.bias):
                if key is not None:
                    tensors[key] = _times(tensors[key], ratio)
        tensors[module.down] = _padded_a(tensors[module.down], module.experts, rank)
        tensors[module.up] = _padded_b(tensors[module.up], module.experts * rank)
    if folded and config.get("ensure_weight_tying"):
        raise ExportError(
            f"{', '.join(folded)} would get the scaling in B, and ensure_weight_tying shares matrices between modules, "
            "as A of one and B of the other. Merge the adapter (merge_and_unload) instead."
        )
    config |= {"r": rank, "lora_alpha": alpha, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if config.get("init_lora_weights") == "orthogonal":
        config["init_lora_weights"] = True  # PEFT 0.21 refuses it with an odd rank, also when the adapter is loaded
    _write(target, config, tensors, metadata)
    return UniformAdapter(rank, alpha, len(modules), tuple(folded))


def _read_config(source: Path) -> dict[str, Any]:
    path = source / CONFIG
    if not path.is_file():
        # PEFT 0.21: an adapter that is not called "default" is saved in a folder of its name.
        named = " or ".join(sorted(str(found.parent) for found in source.glob(f"*/{CONFIG}")))
        raise ExportError(
            f"{source} has no {CONFIG}; expected "
            + (
                f"an adapter's own directory, as {named} is."
                if named
                else "the directory that save_pretrained of PEFT wrote."
            )
        )
    config = json_files.read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ExportError(f"{path} has the PEFT type {found!r}; expected 'LORA'.")
    for field in VARIANTS:
        if config.get(field):
            raise ExportError(
                f"{path} has {field}: the update is not scaling * B A, and cannot be brought to one rank by padding. "
                "Expected plain LoRA; merge this adapter (merge_and_unload) instead."
            )
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise ExportError(
            f"{path} has init_lora_weights={init!r}, which may rewrite the base weight by the rank when the adapter is "
            f"loaded; expected {', '.join(map(repr, PLAIN_INITS))}. Save it as plain LoRA first (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), see PEFT), or merge it (merge_and_unload)."
        )
    numbers: list[Any] = [config.get("r"), config.get("lora_alpha")]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        numbers += pattern.values() if isinstance(pattern, dict) else [pattern]
    if not all(json_files.is_number(number) and abs(number) <= MOST for number in numbers):
        raise ExportError(
            f"{path}: r, lora_alpha and the values of rank_pattern and alpha_pattern must be numbers, none above "
            f"{MOST:,}."
        )
    parameters = config.get("target_parameters") or []
    if not (isinstance(parameters, list) and all(isinstance(parameter, str) for parameter in parameters)):
        raise ExportError(f"{path} has target_parameters {parameters!r:.80}; expected a list of names.")
    return config


def _read_tensors(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = source / WEIGHTS
    if not path.is_file():
        if (source / "adapter_model.bin").is_file():
            raise ExportError(
                f"{source} has its matrices in adapter_model.bin, a pickle, which is not opened; expected {WEIGHTS}. "
                "Load it with PeftModel.from_pretrained and save it again: save_pretrained writes safetensors."
            )
        raise ExportError(f"{source} has no {WEIGHTS}; expected the directory that save_pretrained of PEFT wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} cannot be read: {error}. Copy or save the adapter again.") from error


def _modules(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[_Module]:
    """The pairs of matrices among `tensors`; ExportError for a `lora_` tensor that is not of such a pair."""
    parts: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _TENSOR.fullmatch(key)
        if match is not None:
            part = "bias" if match["end"] == ".bias" else match["kind"][-1]
            parts.setdefault(match["module"], {})[part] = key
        elif ".lora_" in key:
            raise ExportError(f"{key} is no lora_A or lora_B; expected plain LoRA. Merge this adapter instead.")
    if not parts:
        raise ExportError("The adapter has no LoRA matrices; expected some. Were they gathered when it was saved?")
    modules = []
    for name, found in parts.items():
        if not {"A", "B"} <= set(found):
            raise ExportError(f"{name} has only {', '.join(found.values())}; expected lora_A and lora_B.")
        down, up = tensors[found["A"]], tensors[found["B"]]
        if down.dim() < 2 or down.dim() != up.dim() or not down.shape[0] or down.shape[0] != up.shape[1]:
            raise ExportError(
                f"lora_A of {name} has the shape {tuple(down.shape)} and lora_B {tuple(up.shape)}; expected (rank, "
                "inputs) and (outputs, rank). Sharded and grouped matrices cannot be padded."
            )
        rank, scaling = _rank_and_scaling(name.removeprefix("base_model.model."), down.shape[0], config)
        experts = down.shape[0] // rank
        modules.append(_Module(name, rank, experts, scaling, found["A"], found["B"], found.get("bias")))
    return modules


def _rank_and_scaling(name: str, rows: int, config: dict[str, Any]) -> tuple[int, float]:
    """Rank and scaling of the module `name`, whose A has so many rows, as PEFT 0.21 reads them.

    The rows are the rank, except for the fused experts of `target_parameters`: there they are the rank times the
    experts, and the rank is what the configuration says.
    """
    ranks: dict[str, int] = {}
    # A second parameter of a module is a wrapper around the first, and the tensors do not say which is which.
    module = name.replace(".base_layer", "")
    for parameter in config.get("target_parameters") or ():
        key = f"{module}.{parameter.rpartition('.')[2]}"
        if key == parameter or key.endswith(f".{parameter}"):
            ranks[key] = _matching(config.get("rank_pattern") or {}, key, config["r"])
    found = {
        (rank, _matching(config.get("alpha_pattern") or {}, key, config["lora_alpha"]))
        for key, rank in (ranks or {name: rows}).items()
    }
    rank, alpha = found.pop()
    if found or not isinstance(rank, int) or rank < 1 or rows % rank:
        raise ExportError(
            f"The rank of {name} is not known: lora_A has {rows} rows, and its parameters {', '.join(ranks)} have the "
            f"ranks {', '.join(map(str, ranks.values()))}; expected one rank and one lora_alpha for all of them."
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches, as PEFT's `get_pattern_key` does it; importing that takes seconds.

    Raises:
        ExportError: a key is no regular expression, or one that may take for ever, as nested repeats do in `re`.
    """
    for key, value in pattern.items():
        try:
            if regex.match(rf"(.*\.)?({key})$", name, timeout=SECONDS):
                return value
        except (regex.error, TimeoutError) as error:
            raise ExportError(
                f"{CONFIG} has the pattern {key!r:.80}, which cannot be matched with {name}: {error}. Expected the "
                "names of modules, or regular expressions as PEFT writes them."
            ) from error
    return default


def _alpha(modules: list[_Module], rank: int, tensors: dict[str, Tensor]) -> float:
    """lora_alpha for the scaling that most modules have; whole, since Ollama reads no other, where that costs nothing.

    Another lora_alpha than the exact one goes into B, which float32 holds to 6e-8 and half precision does not.
    """
    count = Counter(f"{module.scaling:.12e}" for module in modules)
    exact = {key: float(key) * rank for key in count}
    common = max(count, key=lambda key: (count[key], _is_whole(exact[key])))
    precise = all(tensors[module.up].dtype in (torch.float32, torch.float64) for module in modules)
    whole = max(1, round(exact[common]))
    return whole if precise or _is_whole(exact[common]) else exact[common]


def _is_whole(number: float) -> bool:
    return math.isclose(number, round(number), rel_tol=1e-9)


def _times(tensor: Tensor, ratio: float) -> Tensor:
    return (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * ratio).to(tensor.dtype)


def _padded_a(a: Tensor, experts: int, rank: int) -> Tensor:
    """(experts * r, ...) -> (experts * rank, ...): each expert's rows are followed by zeros (PEFT's ParamWrapper)."""
    rows = a.reshape(experts, -1, *a.shape[1:])
    zeros = a.new_zeros((experts, rank - rows.shape[1], *a.shape[1:]))
    return torch.cat([rows, zeros], dim=1).flatten(0, 1)


def _padded_b(b: Tensor, columns: int) -> Tensor:
    """(out, r * experts, ...) -> (out, columns, ...); the rank is the slow index, so zeros at the end are enough."""
    return torch.cat([b, b.new_zeros((b.shape[0], columns - b.shape[1], *b.shape[2:]))], dim=1)


def _write(target: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Both files or none: a directory beside `target`, renamed to it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            whole = Path(temporary, "adapter")  # with the rights that the user gives new directories
            json_files.write_text(whole / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_file(tensors, whole / WEIGHTS, metadata=metadata)
            with open(whole / WEIGHTS, "rb") as file:
                os.fsync(file.fileno())
            os.replace(whole, target)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{target} cannot be written: {error}. Make room, or choose another place.") from error
