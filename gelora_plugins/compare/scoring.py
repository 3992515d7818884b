"""The score of what a model answers, what each row adds to it, its loss, and the loss of the constant answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gelora_plugins.compare.generate import generated
from gelora_plugins.compare.metrics import SCORES, exact_match, is_own, own, parts_of
from gelora_plugins.compare.task import Collator
from gelora_plugins.errors import ConfigError
from gelora_plugins.probe.documents import IGNORED_LABEL


def evaluate(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    metric: str,
    batch_size: int,
    *,
    bf16: bool = False,
    tokenizer: Any = None,
) -> tuple[float, float, list[float]]:
    """(score, loss, what each row adds to the score) of `model` on encoded rows, in their order; see `parts_of`.

    `metric` is one of `Task.metric`. The tokenizer is needed where text is generated.

    The loss is the mean per token that counts, or per row. It is computed from the logits: the loss that PEFT 0.21
    returns for AdaLoRA has its regulariser in it.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    answers: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(order), batch_size):
            taken = [rows[i] for i in order[start : start + batch_size]]
            batch = {name: x.to(device) for name, x in collator(taken).items()}
            target = batch.pop("labels")
            logits = model(**batch).logits.float()
            of_rows, counted = _loss_by_row(collator.kind, logits, target)
            losses.append(of_rows.double().cpu())
            counts.append(counted.cpu())
            if collator.kind == "causal-lm":
                right = (logits[:, :-1].argmax(-1) == target[:, 1:]) & (target[:, 1:] != IGNORED_LABEL)
                answers.append(right.sum(1).cpu())
            elif metric != "loss":
                answers.append((logits.argmax(-1) if collator.kind == "classification" else logits.squeeze(-1)).cpu())
                labels.append(target.cpu())
        if collator.kind == "causal-lm" and metric not in ("loss", "token_accuracy"):
            texts, references = generated(model, rows, tokenizer, collator.pad, batch_size)
    by_row, count = torch.cat(losses).numpy(), max(int(torch.cat(counts).sum()), 1)
    loss = float(by_row.sum() / count)
    if metric == "loss":
        score, parts = loss, by_row * len(rows) / count
    elif metric == "token_accuracy":
        parts = torch.cat(answers).double().numpy() * len(rows) / count
        score = float(parts.mean())
    elif collator.kind == "causal-lm":
        found = (own(metric) if is_own(metric) else exact_match)(texts, references)
        parts = _numbers(found, metric, len(rows))
        return float(parts.mean()), loss, parts.tolist()
    else:
        function = SCORES[metric] if metric in SCORES else _one_number(metric)
        given, true = torch.cat(answers).numpy(), torch.cat(labels).numpy()
        score, parts = function(given, true), parts_of(function, given, true)
    placed = np.empty(len(rows))
    placed[order] = parts
    return score, loss, placed.tolist()


def _one_number(metric: str) -> Callable[[Any, Any], float]:
    function = own(metric)
    return lambda answers, labels: float(_numbers([function(answers, labels)], metric, 1)[0])


def _numbers(found: Any, metric: str, count: int) -> Any:
    """What the user's own metric gave, as (count,) float64. Raises ConfigError where it is something else."""
    try:
        numbers = np.asarray(found, dtype=float)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        expected = "a number" if count == 1 else f"{count} numbers, one a row"
        raise ConfigError(f"The metric {metric} gave {found!r:.80}; expected {expected}.")
    return numbers


def _loss_by_row(kind: str, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(summed loss, number of what counts) of each row of a batch."""
    functional = torch.nn.functional
    if kind == "causal-lm":
        following = target[:, 1:]
        loss = functional.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none")
        return loss.sum(1), (following != IGNORED_LABEL).sum(1)
    if kind == "classification":
        return functional.cross_entropy(logits, target, reduction="none"), torch.ones_like(target)
    loss = functional.mse_loss(logits.reshape(target.shape), target, reduction="none").reshape(len(target), -1)
    return loss.sum(1), torch.full((len(target),), loss.shape[1])


def constant_loss(kind: str, train: Sequence[Mapping[str, Any]], scored: Sequence[Mapping[str, Any]]) -> float:
    """The loss on `scored` of the best answer that is the same for every row, as the labels of `train` say it.

    Of a classification the shares of the labels, of a regression their mean. Both are lists of encoded rows. A label
    that `train` lacks counts as seen once, since its loss would be infinite.
    """
    if kind == "classification":
        counts = Counter(row["labels"] for row in train)
        shares = np.array([max(counts[row["labels"]], 1) / len(train) for row in scored])
        return float(-np.log(shares).mean())
    answer = np.mean([row["labels"] for row in train], axis=0)
    return float(np.square(np.array([row["labels"] for row in scored]) - answer).mean())
