"""What the probe costs on an accelerator, and whether it says there what it says on the CPU.

    python -m benchmarks.speed.accelerator [cost agree eva] [--toy]

cost: the probe beside bare forward passes of the same backbone on the same batches, and the estimates of dimension
beside the probe, for a Llama of 1.2 billion random weights in bfloat16 at 1,024 rows of 512 tokens; estimates on the
CPU, as they are, and on the accelerator. agree: ranks of the policy budget and dimensions of SmolLM2-135M, measured on
the CPU and on the accelerator. eva: PEFT's EVA initialisation on the rows and the model of `cost`, time and memory
beside the probe's. `--toy` makes all of it small, for a machine without an accelerator, and records nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.machine import record
from gelora_plugins import GeLoRAConfig, plugins
from gelora_plugins.compare.bench import device as device_name
from gelora_plugins.compare.bench import peak_memory, reset_peak_memory
from gelora_plugins.demo import passages, smollm2
from gelora_plugins.dimension.measure import estimate_dimensions
from gelora_plugins.pipeline import measure, select_ranks
from gelora_plugins.probe.documents import choose_documents
from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.probe.hidden_states import read_documents
from gelora_plugins.probe.loading import accelerator
from gelora_plugins.probe.point_store import FeatureStore

ROUNDS, BATCH = 5, 16
LLAMA = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
TOY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def seconds_of(work: Callable[[], Any]) -> float:
    """Until the accelerator has done it."""
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def llama(toy: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device(accelerator()):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **(TOY if toy else LLAMA)))
    return model.to(torch.bfloat16).eval()


def random_rows(toy: bool) -> list[dict[str, list[int]]]:
    count, length = (64, 16) if toy else (1024, 512)
    drawn = torch.randint(3, 32000, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in drawn]


def cost(toy: bool) -> dict[str, Any]:
    """Medians over rounds in which all take turns."""
    model, rows = llama(toy), random_rows(toy)
    config = GeLoRAConfig(probe_samples=len(rows), probe_max_length=len(rows[0]["input_ids"]))
    layout, estimator = find_transformers_layout(model), plugins.find("estimator", config.estimator)
    pooling = plugins.find("pooling", config.pooling)
    stores: list[FeatureStore] = []

    def bare() -> None:
        with torch.no_grad():
            for batch in choose_documents(rows, config, model.config, None).batches(config.probe_batch_size):
                model.model(**{name: x.to(model.device) for name, x in batch.items()}, use_cache=False)

    def probe() -> None:
        documents = choose_documents(rows, config, model.config, None)
        stores.append(FeatureStore(config.feature_storage, len(rows)))
        read_documents(model, layout, documents, pooling, stores[-1], config, progress=False)

    def estimates(where: str | None) -> Callable[[], Any]:
        return lambda: estimate_dimensions(list(stores[-1]), estimator, device=where)

    works = {"bare": bare, "probe": probe, "dimensions": estimates(None), "dimensions there": estimates(accelerator())}
    for work in works.values():
        work()  # the first time is slower
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    medians = {name: statistics.median(found) for name, found in times.items()}
    ours, there = (estimates(where)()[0] for where in (None, accelerator()))
    apart = max(abs(a.value - b.value) / b.value for a, b in zip(there, ours, strict=True) if a.value and b.value)
    return {
        "seconds": times,
        "probe_over_bare": statistics.median(p / b for p, b in zip(times["probe"], times["bare"], strict=True)),
        "dimensions_over_probe": medians["dimensions"] / medians["probe"],
        "dimensions_there_over_probe": medians["dimensions there"] / medians["probe"],
        "largest_relative_difference_of_estimates": apart,
    }


def agree(toy: bool) -> dict[str, Any]:
    """The share of the blocks whose ranks are equal, and the largest difference of a dimension in standard errors."""
    rows = passages(AutoTokenizer.from_pretrained(smollm2()), 64 if toy else 512, 32 if toy else 128)
    config = GeLoRAConfig(policy="budget", probe_samples=len(rows), probe_max_length=len(rows[0]["input_ids"]))
    plans = []
    for place in ("cpu", accelerator()):
        base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).to(place)
        plans.append(select_ranks(get_peft_model(base, LoraConfig(**LORA)), rows, config, progress=False))
    estimates = [plan.profile.estimates for plan in plans]
    pairs = [(a, b) for a, b in zip(*estimates, strict=True) if a.value is not None and b.value is not None]
    return {
        "equal_ranks": statistics.fmean(a == b for a, b in zip(plans[0].ranks, plans[1].ranks, strict=True)),
        "largest_difference_in_std_errors": max(abs(a.value - b.value) / a.std_error for a, b in pairs if a.std_error),
    }


def eva(toy: bool) -> dict[str, Any]:
    """Seconds and peak bytes of EVA's initialisation and of GeLoRA's measurement, each with a fresh adapter."""
    model, rows, found = llama(toy), random_rows(toy), {}
    for name, initialisation in (("gelora", True), ("eva", "eva")):
        adapted = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=initialisation))
        reset_peak_memory()
        found[name] = {"seconds": seconds_of(partial(PREPARE[name], adapted, rows)), "peak_bytes": peak_memory()}
        model = adapted.unload()
    return found


def _measure(model: Any, rows: list[dict[str, list[int]]]) -> None:
    config = GeLoRAConfig(probe_samples=len(rows), probe_max_length=len(rows[0]["input_ids"]))
    measure(model, rows, config, progress=False)


def _initialise(model: Any, rows: list[dict[str, list[int]]]) -> None:
    batches = [
        {key: torch.tensor([row[key] for row in rows[i : i + BATCH]], device=model.device) for key in rows[0]}
        for i in range(0, len(rows), BATCH)
    ]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


PREPARE = {"gelora": _measure, "eva": _initialise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[bool], dict[str, Any]]] = {"cost": cost, "agree": agree, "eva": eva}
    parser.add_argument("parts", nargs="*", default=list(parts))
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    if not options.toy and accelerator() == "cpu":
        raise SystemExit("No accelerator is here. --toy tries the script on the CPU.")
    found: dict[str, Any] = {"device": device_name()}
    for name in options.parts:
        found[name] = parts[name](options.toy)
        print(name, found[name], flush=True)
        if not options.toy:
            record("accelerator", found)


if __name__ == "__main__":
    main()
