"""What every run of a comparison has in common: the model, the encoded task, the target modules, the settings."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gelora_plugins.compare.allocations import ALLOCATIONS, METHODS, USUAL, check_allocations
from gelora_plugins.compare.task import Collator, Task, encode
from gelora_plugins.errors import ConfigError, LayoutError, ProbeError
from gelora_plugins.findings.record import digest
from gelora_plugins.layout import Linear, ModelLayout
from gelora_plugins.methods.by_name import make_method
from gelora_plugins.plugins import find_layout
from gelora_plugins.probe.loading import accelerator, four_bits
from gelora_plugins.ranks.plan import Site, layout_sites, named
from gelora_plugins.report.versions import versions

_TRAINING = (
    "rank",
    "lora_alpha",
    "target_modules",
    "epochs",
    "batch_size",
    "warmup",
    "bf16",
    "load_in_4bit",
    "rows_per_seed",
)
HEADS = ("classifier", "score")  # what PEFT 0.21 trains beside the adapter of a SEQ_CLS model
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_VERSIONS = ("gelora", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Settings:
    """How every method of a comparison is trained. The same for all of them.

    Attributes:
        rank, lora_alpha: the user's own LoRA configuration: the budget, and the scaling of every method.
        target_modules: "all-linear" (of the blocks), or endings of module names with commas.
        allocations: which ranks: some of ALLOCATIONS.
        methods: how they are trained: some of METHODS, and training methods that are registered, with options if
            wanted, as in "flat_lora sigma=0.1". Each trains each allocation but the grid, except those that choose
            ranks themselves.
        grid: the uniform ranks that a user would otherwise search.
        headroom: how many random allocations to train at the cost of each plan, or of `rank` where there is none, to
            say how much could be won by moving ranks; 0: none. They have the rates of uniform ranks.
        seeds: runs of each method; seed s fixes its head, its adapter, its data order and its rows.
        rows_per_seed: how many of the training rows each seed draws for itself, the same for every method; None: all,
            so that seeds do not vary the rows. What is measured once (GeLoRA's profile, EVA's components) is measured
            on all training rows.
        rates: learning rates that the search of each method begins with, see `rates.py`; one is not chosen but taken.
        rate_seeds: seeds of the search, other ones than those that judge; each holds out another fifth of the training
            rows. With one, the luck of a rate passes for a difference between methods.
        head_rate: learning rate of what is trained beside the adapter, such as a classification head, for all methods.
            None: chosen once, on uniform LoRA of `rank`, where rates are chosen; 0: that of the adapter.
        epochs, batch_size, warmup: of every run; the rate rises over the share `warmup` of the steps, then falls
            linearly to 0.
        bf16: train and score in bfloat16 mixed precision. The weights, the probe and EVA stay in float32.
        load_in_4bit: the pretrained weights are NF4, as in QLoRA; the head and the adapter are not. None: they are not.
        margin: two methods are called equal where their difference is, with 95 % confidence, no larger than this;
            hundredths of a score, or loss as it is. 0: only where all their scores are the same.
    """

    rank: int = 8
    lora_alpha: float = 16
    target_modules: str = "all-linear"
    allocations: tuple[str, ...] = USUAL
    methods: tuple[str, ...] = METHODS
    grid: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    headroom: int = 0
    seeds: int = 5
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    rate_seeds: int = 5
    head_rate: float | None = None
    epochs: int = 3
    batch_size: int = 16
    warmup: float = 0.06
    bf16: bool = False
    load_in_4bit: bool | None = None
    margin: float = 0.0
    rows_per_seed: int | None = None

    def __post_init__(self) -> None:
        check_allocations(self.allocations)
        for method in self.methods:
            _check_method(method)
        if not self.methods:
            raise ConfigError("There are no methods; expected at least lora.")
        for name in ("rank", "seeds", "rate_seeds", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected at least 1.")
        if not self.rates or not all(math.isfinite(rate) and rate > 0 for rate in self.rates):
            raise ConfigError(f"rates are {self.rates!r}; expected at least one, all above 0.")
        if self.head_rate is not None and not (math.isfinite(self.head_rate) and self.head_rate >= 0):
            raise ConfigError(f"head_rate is {self.head_rate!r}; expected more than 0, or 0 for the adapter's rate.")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ConfigError(f"margin is {self.margin!r}; expected 0 or more.")
        if self.grid and min(self.grid) < 1:
            raise ConfigError(f"grid is {self.grid!r}; expected ranks of at least 1.")
        if self.headroom:
            self._check_headroom()
        if self.load_in_4bit and "full" in self.methods:
            raise ConfigError("load_in_4bit leaves no weights that full fine-tuning could train; leave out full.")
        if self.rows_per_seed is not None and self.rows_per_seed < 10:
            raise ConfigError(f"rows_per_seed is {self.rows_per_seed!r}; expected at least 10, or None.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup is {self.warmup!r}; expected a share of the steps, from 0 to below 1.")

    def _check_headroom(self) -> None:
        if self.headroom < 3 or self.seeds < 2:
            raise ConfigError(
                f"headroom is {self.headroom!r} and seeds is {self.seeds!r}; expected 0, or at least 3 random "
                "allocations and 2 seeds: their spread is what is asked for."
            )
        if "uniform" not in self.allocations or "lora" not in self.methods:
            raise ConfigError(
                "headroom needs uniform among the allocations and lora among the methods: random allocations have "
                "their rates, and are compared with them."
            )

    @property
    def scaling(self) -> float:
        """lora_alpha / r, the same for every method."""
        return self.lora_alpha / self.rank


@dataclass(frozen=True)
class Bench:
    """A model and a task on which recipes are trained. Every run loads a fresh model from `model`.

    `folder` is where what is measured once is kept: the dimension profile, EVA's components.
    """

    model: str
    task: Task
    settings: Settings
    folder: Path

    def __post_init__(self) -> None:
        count, rows = self.settings.rows_per_seed, len(self.task.train)
        if count is not None and count > rows:
            raise ProbeError(f"rows_per_seed is {count:,}; expected at most the {rows:,} training rows of the task.")

    def load(self, seed: int) -> Any:
        """The pretrained model with the task's head, in float32 or 4 bits, on the accelerator where there is one.

        A head that is not in it is drawn with `seed`.
        """
        import transformers

        options: dict[str, Any] = {"dtype": torch.float32}
        if self.settings.load_in_4bit:
            options["device_map"] = {"": accelerator()}
            compute = torch.bfloat16 if self.settings.bf16 else torch.float32
            options["quantization_config"] = four_bits(compute, None if self.task.kind == "causal-lm" else HEADS)
        if self.task.kind == "causal-lm":
            loader = transformers.AutoModelForCausalLM
        else:
            loader = transformers.AutoModelForSequenceClassification
            options["num_labels"] = self.task.num_labels
            regression = self.task.kind == "regression"
            options["problem_type"] = "regression" if regression else "single_label_classification"
        torch.manual_seed(seed)
        try:
            with quiet():
                model = loader.from_pretrained(self.model, **options)
        except (OSError, ValueError) as error:
            raise ProbeError(f"{self.model} cannot be loaded: {str(error).splitlines()[0]}") from error
        model.config.pad_token_id = self.collator.pad
        return model if self.settings.load_in_4bit else model.to(accelerator())

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; None where every row has `input_ids`."""
        import transformers

        if all("input_ids" in row for rows in (self.task.train, self.task.test) for row in rows):
            return None
        return transformers.AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def collator(self) -> Collator:
        """Pads with the tokenizer's padding token, or its end token, or 0."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return Collator(self.task.kind, (getattr(self.tokenizer, "eos_token_id", None) or 0) if pad is None else pad)

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        """The encoded training rows. Raises ProbeError where too many are cut, see `encode`, or too few are left."""
        rows, count = encode(self.task, self.task.train, self.tokenizer), self.settings.rows_per_seed
        if count is not None and count > len(rows):
            raise ProbeError(
                f"rows_per_seed is {count:,}; {len(rows):,} training rows have an answer within max_length, which is "
                f"{self.task.max_length}. Give fewer, or a larger max_length."
            )
        return rows

    def drawn(self, seed: int) -> list[dict[str, Any]]:
        """The encoded training rows of a seed."""
        count = self.settings.rows_per_seed
        return self.train if count is None else random.Random(seed).sample(self.train, count)

    @cached_property
    def test(self) -> list[dict[str, Any]]:
        """The encoded test rows."""
        return encode(self.task, self.task.test, self.tokenizer)

    @property
    def notes(self) -> list[str]:
        """How many rows are left out, if any."""
        parts = (("training", self.task.train, self.train), ("test", self.task.test, self.test))
        return [
            f"{len(given) - len(kept):,} of {len(given):,} {name} rows are left out: max_length, which is "
            f"{self.task.max_length}, cuts off their whole answer."
            for name, given, kept in parts
            if len(kept) < len(given)
        ]

    @cached_property
    def _facts(self) -> tuple[ModelLayout, int, str]:
        model = self.load(0)
        sha = hashlib.sha256()
        for name, value in sorted(model.state_dict().items()):
            sha.update(name.encode())
            sha.update(value.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
        return find_layout(model), model.num_parameters(), sha.hexdigest()

    @property
    def layout(self) -> ModelLayout:
        """The blocks of the model."""
        return self._facts[0]

    @property
    def num_parameters(self) -> int:
        """All parameters of the model, its head too."""
        return self._facts[1]

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 over the names and values of all weights, with the head of seed 0."""
        return self._facts[2]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the score of a run depends on, but for its recipe, seed and rate."""
        settings = asdict(self.settings)
        return {
            "model": self.model_fingerprint,
            "task": self.task.fingerprint,
            "training": {name: settings[name] for name in _TRAINING if settings[name] is not None},
            "versions": {name: v for name, v in versions().items() if name in _VERSIONS},
            "device": device(),
        }

    @property
    def cache(self) -> Path:
        """The folder of what was measured once, for this identity alone."""
        return self.folder / f"cache-{digest(self.identity)[:12]}"

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The blocks that have target modules. Raises LayoutError when none has."""
        sites = layout_sites(self.layout, self._is_target)
        if not sites:
            raise LayoutError(f"No linear map in the blocks ends in any of: {self.settings.target_modules}.")
        return sites

    @cached_property
    def targets(self) -> dict[str, Linear]:
        """The target modules by path, in the order of the blocks."""
        linears = (linear for block in self.layout.blocks for linear in block.linears)
        return {linear.name: linear for linear in linears if self._is_target(linear.name)}

    def _is_target(self, path: str) -> bool:
        return named(self.settings.target_modules)(path)


def _check_method(text: str) -> None:
    if text in ALLOCATIONS:
        raise ConfigError(f"There is no method {text!r}: it is an allocation of ranks. Name it among those.")
    if text not in METHODS:
        make_method(text)


def device() -> str:
    """What the Trainer trains on: the name of a CUDA device, else the kind of accelerator, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else accelerator()


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # Linux: the process's peak starts anew (proc_pid_clear_refs(5))


def peak_memory() -> int | None:
    """Bytes, of the accelerator, else of the process; None where that cannot be known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not STATUS.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and the "newly initialized" warning of a hundred loads of one model."""
    from transformers.utils import logging as messages

    level, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity(logging.ERROR)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bars:
            messages.enable_progress_bar()
