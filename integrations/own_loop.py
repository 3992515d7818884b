"""For a loop of one's own: `select_ranks`, which reads texts and chats where it has a tokenizer."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gelora_plugins import pipeline
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ProbeError
from gelora_plugins.mistakes import reason
from gelora_plugins.probe.distributed import ALONE, Processes
from gelora_plugins.probe.find_blocks import unwrap
from gelora_plugins.probe.formats import TokenisedRows, are_for_trl, check_fields
from gelora_plugins.ranks.plan import RankPlan

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from gelora_plugins.probe.documents import Collator
    from gelora_plugins.probe.hidden_states import Autocast

logger = logging.getLogger(__name__)


def select_ranks(
    model: nn.Module,
    dataset: Any,
    config: GeLoRAConfig | None = None,
    *,
    tokenizer: Any = None,
    text_field: str = "text",
    lora_config: LoraConfig | None = None,
    collator: Collator | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
    autocast: Autocast = nullcontext,
) -> RankPlan:
    """Measure `dataset` in `model` and choose a LoRA rank for every block. The model is left as it was.

    Args:
        model: a model without an adapter, or a PEFT model whose LoRA adapter has not been trained.
        dataset: the training rows, with `input_ids`; others need a `tokenizer` or a `collator`. A bare iterator is used
            up as far as it is read, and a data set that would lose its rows so is refused.
        config: the options.
        tokenizer: for rows of text, pairs of texts, chats, prompts or preferences, which are read as `gelora probe`
            reads them: a `datasets.Dataset`, or a list of dictionaries with the same fields.
        text_field: the field of plain text in such rows.
        lora_config: for a model without an adapter, the configuration it will get; the default adapts every
            linear map of the blocks with PEFT's default `r` and `lora_alpha`.
        collator: makes a batch of rows, as for a `DataLoader`.
        progress: whether to show on standard error how far it is: a bar, or lines where that is no terminal.
        processes: `Processes.all()` where every process of a run makes this call: they share the work, the first
            one's rows are read, and all get its plan.
        autocast: what the forward passes run under: the mixed precision of the training, where it has one.

    Returns:
        The plan: `apply_plan(model, plan)` for an adapter that exists, `LoraConfig(**plan.lora_config_kwargs())`
        for one to be made.

    Raises:
        GeLoRAError: nothing can be measured or chosen; the message says why and what to do.
    """
    config = config or GeLoRAConfig()
    if tokenizer is not None:
        if collator is not None:
            raise ProbeError("Both a tokenizer and a collator were given; expected the one that reads these rows.")
        dataset = prepared_rows(_table(dataset), model, tokenizer, text_field, config.probe_max_length)
    return pipeline.select_ranks(
        model,
        dataset,
        config,
        lora_config=lora_config,
        collator=collator,
        progress=progress,
        processes=processes,
        autocast=autocast,
    )


def prepared_rows(
    dataset: Any, model: Any, tokenizer: Any, text_field: str, max_length: int, data: str = "the data"
) -> Any:
    """The rows of a `datasets.Dataset` with token ids: as TRL would train on them, where they are of a kind that it
    trains on. What comes of TRL says so in its attribute `note`.

    Raises:
        ProbeError: rows with these fields can be read in no way, or not without TRL. When rows are read: one cannot be.
    """
    check_fields(dataset.column_names, text_field, data)
    root: Any = unwrap(model)
    generates = getattr(root, "can_generate", lambda: False)()
    # TRL trains causal models, and takes no tokenizer without an end of text (trl 1.16).
    writes = generates and not root.config.is_encoder_decoder and tokenizer.eos_token is not None
    if not are_for_trl(dataset.column_names, text_field if writes else None, find_spec("trl") is not None):
        return TokenisedRows(dataset, tokenizer, text_field, data)
    from .trl_rows import TrlRows

    rows = TrlRows(dataset, tokenizer, text_field, max_length, data)
    logger.info(rows.note)
    return rows


def _table(rows: Any) -> Any:
    """A `datasets.Dataset`, made of a list of rows where it is none."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return rows
    if not isinstance(rows, (list, tuple)):
        raise ProbeError(
            f"The rows are a {type(rows).__name__}; with a tokenizer expected a datasets.Dataset or a list of "
            "dictionaries. Take as many rows as are to be measured: list(itertools.islice(rows, 1024))."
        )
    try:
        return Dataset.from_list(list(rows))
    except Exception as error:  # of pyarrow, where rows differ in what a field holds
        raise ProbeError(f"The rows make no table: {reason(error)}. Give all of them the same fields.") from error
