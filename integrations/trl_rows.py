"""Rows as TRL's trainers prepare them, where there is no trainer yet, with the functions of the trainers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from types import SimpleNamespace
from typing import Any

import trl
from trl.data_utils import is_conversational

from gelora_plugins.errors import ProbeError
from gelora_plugins.mistakes import reason
from gelora_plugins.probe.documents import MEDIA

# Stanford Alpaca's prompt, for tokenizers without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{0}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{1}\n\n{2}### Response:\n"
)


class TrlRows:
    """A map-style view of `dataset`, whose rows are the token ids that a trainer of TRL makes of it by its defaults.

    Pairs are prepared by DPOTrainer, and a row is the prompt with the chosen answer; prompts with answers and labels by
    KTOTrainer; prompts alone as by GRPOTrainer; everything else by SFTTrainer. What the trainer leaves out is left out.

    Args:
        dataset: a `datasets.Dataset`.
        text_field: the column of plain text.
        max_length: tokens of a document that will be read; TRL's own limit is raised to it.
        data: name of the dataset, for messages.

    Attributes:
        note: how the rows are read, in a sentence.

    Raises:
        ProbeError: rows with images or the like, or with several completions. When rows are read: TRL cannot.
    """

    def __init__(self, dataset: Any, tokenizer: Any, text_field: str, max_length: int, data: str = "the data") -> None:
        columns = set(dataset.column_names)
        if media := sorted(columns & MEDIA):
            raise ProbeError(
                f"The rows have {', '.join(media)}, and text only is read here. Use GeLoRACallback in the "
                "trainer, which measures what its collator makes, or select_ranks(model, rows, collator=...)."
            )
        if "completions" in columns:
            raise ProbeError(
                "The rows have several completions to a prompt, which TRL tokenises step by step, for reward models "
                "only. Give rows with input_ids, tokenised as your trainer does."
            )
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.max_length = max_length
        self.data = data
        self.trainer = _reader(columns)
        self.note = f"Rows are prepared as the {self.trainer} of trl {trl.__version__} does by default."
        self.is_alpaca = self.trainer == "SFTTrainer" and {"instruction", "output"} <= columns
        if self.trainer == "DPOTrainer":
            self.note += " Measured: the prompt with the chosen answer."
        if self.is_alpaca:
            self.note += f" Alpaca's columns are put into {'a chat' if tokenizer.chat_template else 'its prompt'}."

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return next(self.rows_at([i]))

    def rows_at(self, indices: Sequence[int]) -> Iterator[dict[str, list[int]]]:
        """The rows of these numbers, in this order; each is prepared when it is read."""
        try:
            for row in self._prepare(self.dataset.select(indices).to_iterable_dataset()):
                parts = (row.get(name, ()) for name in ("prompt_ids", "chosen_ids", "completion_ids"))
                yield {"input_ids": row["input_ids"] if "input_ids" in row else [*chain(*parts)]}
        except Exception as error:
            if len(indices) > 1:  # the stream does not say which of them it was
                for i in indices:
                    list(self.rows_at([i]))
            raise ProbeError(
                f"Row {indices[0] + 1} of {self.data}: the {self.trainer} of trl {trl.__version__} cannot prepare rows "
                f"with the fields {', '.join(self.dataset.column_names)}: {reason(error)}. Expected a format of "
                "TRL's (text, messages, prompt and completion, chosen and rejected, or prompt), or input_ids."
            ) from error

    def _prepare(self, rows: Any) -> Any:
        """What the trainer makes of a stream of rows. It needs no more of itself for that (trl 1.9 to 1.16)."""
        if self.trainer == "GRPOTrainer":
            return rows.map(self._prompt)
        if self.is_alpaca:
            rows = rows.map(self._alpaca, remove_columns=self.dataset.column_names)
        defaults = fields(getattr(trl, self.trainer.replace("Trainer", "Config")))
        args = SimpleNamespace(**{field.name: field.default for field in defaults})
        args.dataset_text_field = self.text_field
        args.max_length = max(args.max_length, self.max_length)
        itself = SimpleNamespace(
            _tokenizer=self.tokenizer, chat_template=None, completion_only_loss=True, calculate_KL=False
        )
        more = {"packing": False, "formatting_func": None} if self.trainer == "SFTTrainer" else {}
        prepare = getattr(trl, self.trainer)._prepare_dataset
        return prepare(itself, rows, self.tokenizer, args, dataset_name="train", **more)

    def _prompt(self, row: Mapping[str, Any]) -> dict[str, list[int]]:
        """A prompt as GRPOTrainer and RLOOTrainer give it to the model; they read no tools from rows (trl 1.16)."""
        prompt = row["prompt"]
        if not is_conversational({"prompt": prompt}):
            return {"input_ids": self.tokenizer(text=prompt)["input_ids"]}
        made = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
        return {"input_ids": made["input_ids"]}

    def _alpaca(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of Alpaca's columns as a prompt and its completion."""
        task, given, answer = row["instruction"], row.get("input") or "", row["output"]
        if self.tokenizer.chat_template:
            asked = f"{task}\n{given}" if given else task
            return {
                "prompt": [{"role": "user", "content": asked}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        paired = ", paired with an input that provides further context" if given else ""
        asked = _ALPACA.format(paired, task, f"### Input:\n{given}\n\n" if given else "")
        return {"prompt": asked, "completion": answer}


def _reader(columns: set[str]) -> str:
    """The trainer for rows with these columns."""
    if {"chosen", "rejected"} <= columns:
        return "DPOTrainer"
    if {"prompt", "completion", "label"} <= columns:
        return "KTOTrainer"
    return "GRPOTrainer" if "prompt" in columns and "completion" not in columns else "SFTTrainer"
