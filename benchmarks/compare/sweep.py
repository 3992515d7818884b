"""Many rates beside the one that the search chose: python -m benchmarks.compare.sweep [--seeds 10] [--jobs 2]

Uniform rank 8 on `docstrings`, with the head's rate of benchmarks/results/compare-tuned, and recorded with the runs of
that comparison, so that none is made twice. PREREGISTRATION.md says which rates, and what is judged.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.compare.tasks import task_and_settings
from benchmarks.machine import RESULTS, record
from gelora_plugins import json_files
from gelora_plugins.compare.allocations import lora
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.rates import rounded
from gelora_plugins.compare.run import Trainers
from gelora_plugins.findings.record import Record, Run, diverged, locked

LOW, FACTOR, STEPS = 0.0022, 1.3, range(-2, 6)
SAME = 0.06  # a rate that differs by no more from one that the comparison judged is that one
GOOD, WITHIN = 74.5, 1.0  # the score to reach, and points from the sweep's best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RESULTS / "compare-tuned" / "docstrings")
    options = parser.parse_args()
    made = json_files.read_json(options.folder / "experiment.json")
    head_rate = made["head"]["chosen"]
    uniform = next(m for row in made["rows"] for m in row["methods"] if m["name"] == "uniform")
    rate = uniform["search"]["chosen"]
    judged = {rate, *(other["rate"] for other in uniform["others"])}
    model, task, settings = task_and_settings("docstrings", None)
    bench = Bench(model, task, settings, options.folder)
    assert bench.identity == made["identity"], "the comparison was made with other settings, versions or another device"
    recipe = lora([settings.rank] * len(bench.sites), bench.sites)
    others = (rounded(LOW * FACTOR**step) for step in STEPS)
    rates = sorted({*judged, *(r for r in others if all(abs(r / j - 1) > SAME for j in judged))})
    runs = {
        rate: [Run("sweep", "uniform", recipe, seed, rate, False, head_rate) for seed in range(options.seeds)]
        for rate in rates
    }
    with locked(options.folder):
        found = Record(options.folder / "runs.jsonl", bench.identity)
        wanted = [made for of_seed in zip(*runs.values(), strict=True) for made in of_seed]
        with tqdm(total=len(wanted), unit="run") as bar:
            found.make(wanted, Trainers(bench, options.jobs), bar)
    rows: list[dict[str, Any]] = []
    for rate_, made_ in runs.items():
        lines = [found.lines[run.key(bench.identity)] for run in made_]
        gone = sum(map(diverged, lines))
        scores = [100 * line["score"] for line in lines if not diverged(line)]
        rows.append({"rate": rate_, "diverged": gone, "scores": scores, "losses": [line["loss"] for line in lines]})
    means = {row["rate"]: statistics.fmean(row["scores"]) for row in rows if not row["diverged"]}
    best = max(means, key=lambda rate: means[rate])
    summary = {"chosen": rate, "score": means[rate], "best": best, "best_score": means[best], "head_rate": head_rate}
    print(rows, summary, f"good: {means[rate] >= GOOD and means[best] - means[rate] <= WITHIN}", sep="\n")
    record("compare_sweep", {"task": "docstrings", "seeds": options.seeds, **summary, "rows": rows})


if __name__ == "__main__":
    main()
