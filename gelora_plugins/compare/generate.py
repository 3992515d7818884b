"""What a model generates after each prompt, beside the completion that the row has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gelora_plugins.errors import ProbeError
from gelora_plugins.probe.documents import IGNORED_LABEL


def generated(
    model: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any, pad: int, batch_size: int
) -> tuple[list[str], list[str]]:
    """(answers, references) for encoded rows of prompt and completion, in their order; special tokens are left out.

    Greedy, and up to as many tokens as the longest completion has. Prompts are padded on the left.

    Raises:
        ProbeError: a completion was cut by max_length, so nothing could match it.
    """
    split = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED_LABEL) for row in rows]
    prompts = [row["input_ids"][:at] for row, at in zip(rows, split, strict=True)]
    completions = [row["input_ids"][at:] for row, at in zip(rows, split, strict=True)]
    cut = sum(ids[-1] != tokenizer.eos_token_id for ids in completions)
    if cut:
        raise ProbeError(
            f"max_length cuts the completions of {cut:,} of {len(rows):,} scored rows, which no generated text could "
            "match. Give a larger max_length."
        )
    most, device = max(map(len, completions)), next(model.parameters()).device
    answers: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        taken = order[start : start + batch_size]
        length = max(len(prompts[i]) for i in taken)
        empty = [length - len(prompts[i]) for i in taken]
        ids = [[pad] * left + prompts[i] for left, i in zip(empty, taken, strict=True)]
        mask = [[0] * left + [1] * (length - left) for left in empty]
        made = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
        texts = tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        answers |= dict(zip(taken, texts, strict=True))
    return [answers[i] for i in range(len(rows))], tokenizer.batch_decode(completions, skip_special_tokens=True)
