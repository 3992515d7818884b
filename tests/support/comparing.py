"""Comparisons of a tiny model: its rows and settings, a plan without measuring, and trainings that are only said."""

import gc
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.run import compare
from gelora_plugins.compare.task import Task
from gelora_plugins.findings.record import Run
from gelora_plugins.findings.summary import Comparison
from gelora_plugins.ranks.plan import RankPlan
from tests.support.plans import make_plan, make_profile
from tests.support.tiny import build

UNEVEN = (7, 3, 2)
SETTINGS = Settings(
    rank=4,
    lora_alpha=8,
    target_modules="query,key,value,attention.output.dense",  # all 16 by 16 in the tiny model
    seeds=3,
    rate_seeds=1,
    epochs=1,
    batch_size=8,
    rates=(1e-3, 1e-2),
    head_rate=0,
    grid=(4,),
)
Attempt = Callable[..., Any]


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    documents = [[rng.randrange(3, 97) for _ in range(rng.randint(4, 12))] for _ in range(count)]
    return [{"input_ids": ids, "label": int(ids[1] > 50)} for ids in documents]


def tiny_task(name: str = "tiny", **options: Any) -> Task:
    return Task(name, "classification", rows(40, 0), rows(20, 1), **options)


def save_model(directory: Path) -> str:
    build("bert").base_model.save_pretrained(directory)  # without a head, so that each seed draws one
    return str(directory)


def uneven(bench: Bench) -> RankPlan:
    """A plan of the ranks UNEVEN; its profile is made up."""
    profile = replace(make_profile((10.0, 11.0, 12.0, 13.0)), layout=bench.layout)
    return replace(make_plan(), sites=bench.sites, ranks=UNEVEN, base_rank=4, lora_alpha=8, profile=profile)


def compare_tiny(model: str, output: Path, settings: Settings = SETTINGS, task: Task | None = None) -> Comparison:
    """`compare` with one plan, "mine", of the ranks UNEVEN."""
    task = task or tiny_task()
    bench = Bench(model, task, settings, output / task.name)
    return compare(model, task, output, settings, plans={"mine": uneven(bench)}, progress=False)


def result(made: Run, score: float | None, loss: float | None = 0.5) -> dict[str, Any]:
    """What a training of `made` gives."""
    rest = {"constant_loss": 2.0, "seconds": 1.0, "peak_memory": None, "head_parameters": 34}
    return {"score": score, "loss": loss, "lora_parameters": made.recipe.parameters, **rest}


def little_garbage() -> Iterator[None]:
    """A fixture: `Trainer.train` collects garbage, and looks at all that was imported for a third of a tiny run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def valley(made: Run) -> float:
    """A loss that is lowest at the rate 3e-3, and below that of the constant answer wherever it matters."""
    return 0.5 + 0.02 * math.log(made.rate / 3e-3) ** 2


def said(score: Callable[[Run], float | None], loss: Callable[[Run], float | None] = valley) -> Attempt:
    """In the place of `attempt`: no training, the score and the loss that are said."""
    return lambda bench, made, threads=None: result(made, score(made), loss(made))


CHOSEN = replace(SETTINGS, allocations=("plan", "uniform", "permuted", "grid"), methods=("lora",))
PLAIN = replace(CHOSEN, rates=(1e-3,))
SCORES = {"mine": 0.8, "uniform": 0.7, "permuted": 0.6, "full": 0.9}
Say = Callable[[Any], list[Run]]


def usual(made: Run) -> float:
    return SCORES[made.method] + 0.01 * made.seed


def methods_of(found: Comparison) -> list[tuple[str, str]]:
    return [(r.row, r.method) for r in found.results]


WHOLE = [("mine", "mine"), ("mine", "uniform"), ("mine", "permuted"), ("uniform r = 4", "uniform")]


def failing(made: Run, when: bool) -> Any:
    return "OutOfMemoryError: no memory." if when else result(made, usual(made))
