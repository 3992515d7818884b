"""The score of what a model answers, its loss, and the loss of the constant answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gelora_plugins.compare.task import Collator
from gelora_plugins.probe.documents import IGNORED_LABEL


def evaluate(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    collator: Collator,
    metric: str,
    batch_size: int,
    *,
    bf16: bool = False,
) -> tuple[float, float]:
    """(score, loss) of `model` on encoded rows. The loss is the mean per token that counts, or per row.

    It is computed from the logits: the loss that PEFT 0.21 returns for AdaLoRA has its regulariser in it.
    """
    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    total, count = 0.0, 0
    answers: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(ordered), batch_size):
            batch = {name: x.to(device) for name, x in collator(ordered[start : start + batch_size]).items()}
            target = batch.pop("labels")
            logits = model(**batch).logits.float()
            loss, counted = _summed_loss(collator.kind, logits, target)
            total, count = total + loss, count + counted
            if metric != "loss":
                answers.append((logits.argmax(-1) if collator.kind == "classification" else logits.squeeze(-1)).cpu())
                labels.append(target.cpu())
    loss = total / max(count, 1)
    if metric == "loss":
        return loss, loss
    return SCORES[metric](torch.cat(answers).numpy(), torch.cat(labels).numpy()), loss


def _summed_loss(kind: str, logits: Tensor, target: Tensor) -> tuple[float, int]:
    functional = torch.nn.functional
    if kind == "causal-lm":
        following = target[:, 1:]
        loss = functional.cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="sum")
        return loss.item(), int((following != IGNORED_LABEL).sum())
    if kind == "classification":
        return functional.cross_entropy(logits, target, reduction="sum").item(), len(target)
    return functional.mse_loss(logits.reshape(target.shape), target, reduction="sum").item(), target.numel()


def _accuracy(answers: Any, labels: Any) -> float:
    return float((answers == labels).mean())


def _matthews(answers: Any, labels: Any) -> float:
    """For two labels it is the correlation of the two columns; 0 where one of them is constant, as is usual."""
    return 0.0 if np.ptp(answers) == 0 or np.ptp(labels) == 0 else float(np.corrcoef(answers, labels)[0, 1])


def _f1(answers: Any, labels: Any) -> float:
    both, either = int((answers & labels).sum()), int(answers.sum() + labels.sum())
    return 2 * both / either if either else 0.0


def _spearman(answers: Any, labels: Any) -> float:
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(answers) == 0 or np.ptp(labels) == 0 else float(spearmanr(answers, labels).statistic)


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


SCORES: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": _accuracy,
    "mcc": _matthews,
    "f1": _f1,
    "spearman": _spearman,
}
