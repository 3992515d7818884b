"""How the cost of the probe grows, what it would be for large models, and the widest features that it must hold.

    python -m benchmarks.speed.scale [--rounds 3] [--samples 128]     the law, on small random Llama models
    python -m benchmarks.speed.scale --wide [--storage disk]          80 boundaries x 8192 features x 4096 documents

The law, of three parts that are timed apart: the bare forward takes a * FLOP; pooling, which is reading the documents
less the bare forward, b * numbers pooled + d once; the dimensions c * FLOP of the distances + e * points (the halves).
Fitted by non-negative least squares of relative errors on all settings but one, whose total is then predicted; each
takes its turn. The estimate for large models is on paper: their counts in the law of all settings.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import record
from gelora_plugins import GeLoRAConfig
from gelora_plugins.dimension.estimators import twonn_mle
from gelora_plugins.dimension.measure import estimate_dimensions
from gelora_plugins.probe.documents import choose_documents
from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.probe.hidden_states import read_documents
from gelora_plugins.probe.point_store import FeatureStore
from gelora_plugins.probe.pooling import mean

VOCABULARY = 512
SETTINGS = {  # one thing changed at a time, from the first
    "base": {},
    "samples x 2": {"samples": 2},
    "samples x 4": {"samples": 4},
    "tokens x 2": {"tokens": 2},
    "depth x 2": {"depth": 2},
    "width x 2": {"width": 2},
    "width x 3, depth x 2": {"width": 3, "depth": 2},
}
LARGE = {  # published shapes: width, depth, feed-forward width, key-value width
    "Llama 3.1 8B": (4096, 32, 14336, 1024),
    "Llama 3.1 70B": (8192, 80, 28672, 1024),
}


def forward_flop(width: int, depth: int, feed_forward: int, key_value: int, tokens: int, samples: int) -> float:
    """Of the blocks; 2 for each multiply and add. The head is not run."""
    linear = 2 * (2 * width * width + 2 * width * key_value + 3 * width * feed_forward)
    attention = 4 * width * tokens
    return float(samples * tokens * depth * (linear + attention))


def costs(
    width: int, depth: int, feed_forward: int, key_value: int, tokens: int, samples: int
) -> dict[str, list[float]]:
    """What each part is proportional to."""
    boundaries = depth + 1
    return {
        "forward": [forward_flop(width, depth, feed_forward, key_value, tokens, samples)],
        "pooling": [float(boundaries * samples * tokens * width), 1.0],
        "dimensions": [float(2 * boundaries * samples**2 * width), float(boundaries * samples)],
    }


def seconds_of(width: int, depth: int, tokens: int, samples: int, rounds: int) -> dict[str, float]:
    """Median seconds of each part; the bare forward and the reading take turns."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=tokens,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, VOCABULARY, (samples, tokens))
    options = GeLoRAConfig(probe_samples=samples, probe_max_length=tokens)
    probe_set = choose_documents([{"input_ids": row.tolist()} for row in ids], options, config, None)
    layout = find_transformers_layout(model)
    found: dict[str, list[float]] = {"forward": [], "reading": [], "dimensions": []}
    for turn in range(rounds + 1):
        times = [time.perf_counter()]
        with torch.no_grad():
            for batch in probe_set.batches(options.probe_batch_size):
                model.model(**batch, use_cache=False)
        times.append(time.perf_counter())
        store = FeatureStore("memory", samples)
        read_documents(model, layout, probe_set, mean, store, options, progress=False)
        times.append(time.perf_counter())
        estimate_dimensions(store, twonn_mle)
        times.append(time.perf_counter())
        if turn:  # the first passes are slower
            for part, before, after in zip(found, times, times[1:], strict=False):
                found[part].append(after - before)
    pooling = statistics.median(r - f for r, f in zip(found["reading"], found["forward"], strict=True))
    forward, dimensions = statistics.median(found["forward"]), statistics.median(found["dimensions"])
    return {"forward": forward, "pooling": max(pooling, 1e-6), "dimensions": dimensions}


def fit(rows: list[list[float]], seconds: list[float]) -> np.ndarray:
    """The coefficients that give `seconds` from `rows`, non-negative, by least squares of relative errors."""
    weighted = np.array(rows) / np.array(seconds)[:, None]
    scale = weighted.max(axis=0)
    return nnls(weighted / scale, np.ones(len(seconds)))[0] / scale


def predicted(parts: dict[str, list[float]], laws: dict[str, np.ndarray]) -> dict[str, float]:
    return {part: float(np.dot(parts[part], laws[part])) for part in parts}


def law(options: argparse.Namespace) -> None:
    counts, seconds = {}, {}
    for name, change in SETTINGS.items():
        width, depth = 256 * change.get("width", 1), 4 * change.get("depth", 1)
        tokens, samples = 64 * change.get("tokens", 1), options.samples * change.get("samples", 1)
        counts[name] = costs(width, depth, 3 * width, width, tokens, samples)
        seconds[name] = seconds_of(width, depth, tokens, samples, options.rounds)
        ratios = {part: seconds[name][part] / seconds[name]["forward"] for part in ("pooling", "dimensions")}
        print(f"{name:22} of the forward: " + ", ".join(f"{p} {r:.1%}" for p, r in ratios.items()), flush=True)

    def laws(names: list[str]) -> dict[str, np.ndarray]:
        return {p: fit([counts[n][p] for n in names], [seconds[n][p] for n in names]) for p in counts["base"]}

    errors = {}
    for name in SETTINGS:
        held_out = predicted(counts[name], laws([other for other in SETTINGS if other != name]))
        errors[name] = sum(held_out.values()) / sum(seconds[name].values()) - 1
        print(f"{name:22} predicted from the others: {errors[name]:+.0%}")
    every, large = laws(list(SETTINGS)), {}
    for name, shape in LARGE.items():
        parts = predicted(costs(*shape, tokens=512, samples=1024), every)
        large[name] = {part: parts[part] / parts["forward"] for part in ("pooling", "dimensions")}
        size = (shape[1] + 1) * shape[0] * 1024 * 4 / 2**30
        shares = ", ".join(f"{part} {share:.1e}" for part, share in large[name].items())
        print(f"{name}, 1024 documents of 512 tokens, of the forward: {shares}; {size:.1f} GiB of points")
    coefficients = {part: values.tolist() for part, values in every.items()}
    record("scale", {"seconds": seconds, "counts": counts, "errors": errors, "law": coefficients, "large": large})


def wide(options: argparse.Namespace) -> None:
    """Synthetic points of dimension 12 in many features, batch by batch through the storage, then the dimensions."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(options.documents, 12, generator=generator)
    maps = [torch.randn(12, options.features, generator=generator) for _ in range(options.boundaries)]
    with FeatureStore(options.storage, options.documents) as store:
        for batch in source.split(16):
            store.append([torch.tanh(batch @ weights / 4) for weights in maps])
        stored = time.perf_counter()
        estimates, _ = estimate_dimensions(store, twonn_mle)
    done = time.perf_counter()
    del maps
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    result = {
        "boundaries": options.boundaries,
        "features": options.features,
        "documents": options.documents,
        "storage": options.storage,
        "peak_bytes": peak,
        "seconds": {"storing": stored - started, "dimensions": done - stored},
        "dimensions": [estimate.value for estimate in estimates],
    }
    print(f"peak {peak / 2**30:.2f} GiB; storing {stored - started:.0f} s, dimensions {done - stored:.0f} s")
    record("scale_wide", result)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--storage", default="disk", choices=["memory", "half", "disk"])
    parser.add_argument("--boundaries", type=int, default=80)
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=4096)
    options = parser.parse_args()
    (wide if options.wide else law)(options)


if __name__ == "__main__":
    main()
