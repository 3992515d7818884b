"""The tasks of a comparison: rows with labels, tokenised and padded."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gelora_plugins import json_files
from gelora_plugins.compare.metrics import is_own, own, source_of
from gelora_plugins.errors import ConfigError, ProbeError
from gelora_plugins.probe.documents import IGNORED_LABEL
from gelora_plugins.probe.formats import load_rows, row_of, text_of

METRICS = {  # the first is the default
    "classification": ("accuracy", "mcc", "f1", "loss"),
    "regression": ("spearman", "loss"),
    "causal-lm": ("loss", "token_accuracy", "exact_match"),
}
MOST_CUT = 0.1  # a comparison without more of the rows than that is one on other data
NAME = r"\w[\w .,+=()-]{0,99}"  # of what becomes a folder, and a row of tables: no separators, nothing hidden
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows to score on.

    Attributes:
        name: of the task, and of its folder; see `check_name`.
        kind: "classification", "regression" or "causal-lm".
        train, test: rows with `text`, or `text_a` and `text_b`, or `input_ids`, and a `label`; for causal-lm with
            `prompt` and `completion` (only the completion counts), or `text`. The test rows choose nothing.
        metric: of the test rows. Only the loss is better when lower. Of classification accuracy, mcc (Matthews), f1; of
            regression spearman; of causal-lm token_accuracy, the share of the tokens that count which are the likeliest
            after what stands before them in the row, and exact_match of the generated text (greedy) with the
            completion; of all loss. Or package.module:function, a function of answers and labels, one of each a row: of
            classification and regression arrays, for which it gives the score; of causal-lm texts, for which it gives a
            score a row. Scores are from 0 to 1.
        max_length: tokens of a row; what is longer is cut there.

    Raises:
        ConfigError: a name, kind, metric or length that cannot be used.
        ProbeError: too few rows.
    """

    name: str
    kind: str
    train: Sequence[Row] = field(repr=False)
    test: Sequence[Row] = field(repr=False)
    metric: str = ""
    max_length: int = 128

    def __post_init__(self) -> None:
        check_name(self.name, "task")
        if self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length!r}; expected at least 1 token.")
        if self.kind not in METRICS:
            raise ConfigError(f"The kind of task is {self.kind!r}; expected one of: {', '.join(METRICS)}.")
        if not self.metric:
            object.__setattr__(self, "metric", METRICS[self.kind][0])
        if is_own(self.metric):
            own(self.metric)
        elif self.metric not in METRICS[self.kind]:
            raise ConfigError(
                f"The metric is {self.metric!r}; expected one of: {', '.join(METRICS[self.kind])} for {self.kind}, or "
                "package.module:function."
            )
        if self.is_generated and not all("completion" in row for row in self.test):
            raise ConfigError(f"{self.metric} is of generated text; it needs test rows with prompt and completion.")
        if len(self.train) < 10 or not self.test:
            raise ProbeError(f"{len(self.train)} training rows and {len(self.test)} test rows; expected 10 and 1.")
        if self.metric in ("mcc", "f1") and self.num_labels != 2:
            raise ConfigError(f"{self.metric} is for two labels; the rows have {self.num_labels}. Use accuracy.")

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is a better one."""
        return self.metric != "loss"

    @property
    def is_generated(self) -> bool:
        """Whether the metric is of text that the model generates."""
        return self.kind == "causal-lm" and (self.metric == "exact_match" or is_own(self.metric))

    @property
    def labels(self) -> tuple[Any, ...]:
        """The labels of a classification, sorted: of the training and the test rows."""
        return tuple(sorted({row["label"] for rows in (self.train, self.test) for row in rows}))

    @property
    def num_labels(self) -> int:
        """Outputs of the head: labels of a classification, numbers of a regression's label; 0 without a head."""
        if self.kind == "classification":
            return len(self.labels)
        first = self.train[0].get("label")
        return 0 if self.kind == "causal-lm" else len(first) if isinstance(first, Sequence) else 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all rows and settings."""
        source = source_of(self.metric) if is_own(self.metric) else ""
        digest = hashlib.sha256(f"{self.name} {self.kind} {self.metric} {self.max_length}{source}".encode())
        for rows in (self.train, self.test):
            for row in rows:
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def check_name(name: str, what: str) -> None:
    """Raises ConfigError where the name of a `what` cannot be that of a folder and of a row of a table."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"The {what} is called {name!r:.120}; expected up to 100 letters, digits, spaces and any of ._,+=()- that "
            "begin with a letter or a digit."
        )


def load_task(
    name: str,
    kind: str,
    data: str,
    test: str | None = None,
    *,
    metric: str = "",
    max_length: int = 128,
    train_rows: int | None = None,
    test_rows: int | None = None,
) -> Task:
    """A task from files or hub datasets; the rows are a seeded sample where numbers are given.

    Args:
        name, kind, metric, max_length: see `Task`.
        data: training rows, as `gelora probe` takes them.
        test: test rows; without, a fifth of `data`, drawn with seed 0.
        train_rows, test_rows: how many to keep, drawn with seed 0; all where None.

    Raises:
        ConfigError: see `Task`.
        ProbeError: a file cannot be read, or a row cannot be used; both are named.
    """
    rows = _read(data, "train", kind)
    if test is None:
        rows, held_out = split_fifth(rows)
    else:
        held_out = _read(test, "test", kind)
    kinds = sorted({type(row.get("label")).__name__ for row in (*rows, *held_out)})
    if kind == "classification" and len(kinds) > 1:
        raise ProbeError(
            f"The labels of {data}{f' and {test}' if test else ''} are {' and '.join(kinds)}; expected one."
        )
    return Task(name, kind, _sample(rows, train_rows), _sample(held_out, test_rows), metric, max_length)


def _read(data: str, split: str, kind: str) -> list[Any]:
    dataset = load_rows(data, split)
    rows: list[Any] = []
    for i in range(len(dataset)):
        with row_of(data, i + 1):
            row = dataset[i]
            _check(row, kind)
            rows.append(row)
    return rows


def _check(row: Row, kind: str) -> None:
    """Raises ProbeError unless `row` has what is trained on, for a known kind of task."""
    if kind == "causal-lm" and "completion" in row:
        fields = ["prompt", "completion"]
    elif "input_ids" in row:
        fields = []
    else:
        fields = ["text_a", "text_b"] if "text_a" in row and "text_b" in row else ["text"]
    for name in fields:
        if name not in row:
            raise ProbeError(
                f"it has the fields {', '.join(row)}; expected text, text_a and text_b, prompt and completion, or "
                "input_ids."
            )
        text_of(row, name)
    label = row.get("label")
    if kind == "classification" and not isinstance(label, (int, str)):
        raise ProbeError(f"label is {label!r:.80}; expected a whole number or text for {kind}.")
    if kind == "regression":
        numbers = label if isinstance(label, list) and label else [label]
        if not all(json_files.is_number(number) for number in numbers):
            raise ProbeError(f"label is {label!r:.80}; expected a finite number, or a list of them, for {kind}.")


def split_fifth(rows: Sequence[Any], which: int = 0) -> tuple[list[Any], list[Any]]:
    """(four fifths, one fifth) of `rows`, each in their order. The fifths 0 to 4 hold every row once."""
    rng = random.Random(0)
    chosen = set(rng.sample(range(len(rows)), len(rows) // 5))
    if which:
        rest = [i for i in range(len(rows)) if i not in chosen]
        rng.shuffle(rest)
        chosen = set(rest[which - 1 :: 4])
    kept = [row for i, row in enumerate(rows) if i not in chosen]
    return kept, [row for i, row in enumerate(rows) if i in chosen]


def _sample(rows: list[Any], count: int | None) -> list[Any]:
    if count is None or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), count))]


def encode(task: Task, rows: Sequence[Row], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows with `input_ids`, `labels` and what else the tokenizer gives; no padding.

    Rows of a causal-lm of which no token counts are left out: max_length cuts their whole answer off.

    Raises:
        ProbeError: those are more than a tenth, or a row has not what it needs.
    """
    labels = {label: i for i, label in enumerate(task.labels)} if task.kind == "classification" else {}
    encoded = [_encode(task, row, tokenizer, labels) for row in rows]
    kept = [row for row in encoded if task.kind != "causal-lm" or _counts(row)]
    cut = len(rows) - len(kept)
    if cut > MOST_CUT * len(rows):
        raise ProbeError(
            f"max_length is {task.max_length}, and cuts off all that counts in {cut:,} of {len(rows):,} rows: nothing "
            f"of their answers is left. Give a larger max_length, or leave long rows out; up to {MOST_CUT:.0%} of the "
            "rows would be left out here."
        )
    return kept


def _counts(row: Row) -> bool:
    """Whether a token of the row counts in the loss; the first follows nothing, so it never does."""
    return any(label != IGNORED_LABEL for label in row["labels"][1:])


def _encode(task: Task, row: Row, tokenizer: Any, labels: Mapping[Any, int]) -> dict[str, Any]:
    cut = {"truncation": True, "max_length": task.max_length}
    if task.kind == "causal-lm" and "completion" in row:
        return _completion(task, row, tokenizer)
    if "input_ids" in row:
        encoded = {name: row[name][: task.max_length] for name in ("input_ids", "token_type_ids") if name in row}
    elif "text_a" in row and "text_b" in row:
        encoded = dict(tokenizer(row["text_a"], row["text_b"], **cut))
    elif "text" in row:
        encoded = dict(tokenizer(row["text"], **cut))
    else:
        raise ProbeError(
            f"A row has the fields {', '.join(row)}; expected text, text_a and text_b, prompt and completion, or "
            "input_ids."
        )
    if task.kind == "causal-lm":
        return {**encoded, "labels": encoded["input_ids"]}
    if "label" not in row:
        raise ProbeError(f"A row has the fields {', '.join(row)}; expected a label for {task.kind}.")
    return {**encoded, "labels": labels[row["label"]] if labels else row["label"]}


def _completion(task: Task, row: Row, tokenizer: Any) -> dict[str, Any]:
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = (prompt + answer)[: task.max_length]
    return {"input_ids": ids, "labels": ([IGNORED_LABEL] * len(prompt) + answer)[: task.max_length]}


@dataclass(frozen=True)
class Collator:
    """Makes a padded batch of encoded rows: input_ids, attention_mask, labels, and token_type_ids where rows have them.

    `labels` are (rows, tokens) for causal-lm, (rows,) int64 for classification, (rows,) or (rows, outputs) float32 for
    regression.
    """

    kind: str
    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch."""
        length = max(len(row["input_ids"]) for row in rows)
        batch = {"input_ids": _padded(rows, "input_ids", length, self.pad)}
        batch["attention_mask"] = torch.tensor(
            [[int(i < len(row["input_ids"])) for i in range(length)] for row in rows]
        )
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = _padded(rows, "token_type_ids", length, 0)
        if self.kind == "causal-lm":
            batch["labels"] = _padded(rows, "labels", length, IGNORED_LABEL)
        else:
            dtype = torch.float32 if self.kind == "regression" else torch.int64
            batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=dtype)
        return batch


def _padded(rows: Sequence[Row], name: str, length: int, value: int) -> Tensor:
    return torch.tensor([[*row[name], *[value] * (length - len(row[name]))] for row in rows])
