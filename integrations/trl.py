"""GeLoRA in TRL: GeLoRASFTTrainer, the documents of TRL's other trainers, and `gelora sft`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from trl import SFTTrainer, TrlParser
from trl.scripts import sft
from trl.scripts.utils import DatasetConfig

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError, GeLoRAError, ProbeError
from gelora_plugins.mistakes import reason

from .transformers import GeLoRACallback, prepare_trainer

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class GeLoRASFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` that chooses the LoRA ranks of its model from its training data, at the start of `train()`.

    Args:
        gelora: the options; the defaults when left out.
        args, kwargs: as for `trl.SFTTrainer`. The adapter comes from `peft_config`, or the model has one.

    Raises:
        ConfigError: a GeLoRACallback was given as well.
    """

    def __init__(self, *args: Any, gelora: GeLoRAConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if any(isinstance(callback, GeLoRACallback) for callback in self.callback_handler.callbacks):
            raise ConfigError(
                "GeLoRASFTTrainer chooses the ranks itself, and was given a GeLoRACallback as well. Pass "
                "gelora=GeLoRAConfig(...) to GeLoRASFTTrainer, or the callback to trl.SFTTrainer."
            )
        prepare_trainer(self, gelora)


def documents(trainer: Trainer, collator: Callable[[list[Any]], Any]) -> Any:
    """The training rows of a TRL trainer, in a form that can be measured: one document a row.

    SFT's rows are that already. A preference row stands for the first sequence that its trainer's collator makes of
    it, which is what the policy is to prefer: prompt and chosen answer (DPO, Reward), prompt and answer (KTO), cut as
    the trainer cuts it. Rows with images are left to the collator, with
    `first_of_each_pair`.

    Raises:
        ProbeError: the trainer has prompts only and writes its documents while it trains (GRPO, RLOO).
    """
    dataset = trainer.train_dataset
    first = next(iter(dataset), None)
    if getattr(trainer.args, "packing", False) and trainer.args.packing_strategy == "wrapped":
        logger.warning(
            "packing_strategy='wrapped' joins documents, cuts them anywhere, and keeps no trace of where they began "
            "(trl 1.16). Each packed row counts as one document for GeLoRA; packing_strategy='bfd' keeps documents."
        )
    if first is None or "input_ids" in first:
        return dataset
    batch = collator([dict(first)])
    if not isinstance(batch, Mapping):
        raise ProbeError(
            f"{type(trainer).__name__} has prompts only ({', '.join(first)}): it writes what it trains on while it "
            "trains, so there is nothing to measure yet. Make a plan before, from rows of token ids that are like it: "
            "select_ranks(model, rows, lora_config=peft_config).save('plan.json'), then pass "
            "GeLoRACallback(plan='plan.json')."
        )
    if "input_ids" not in batch or "pixel_values" in batch:
        return dataset

    def document(row: Mapping[str, Any]) -> dict[str, Any]:
        made = collator([dict(row)])
        return {name: made[name][0] for name in ("input_ids", "attention_mask") if name in made}

    return _View(dataset, document) if hasattr(dataset, "__len__") else map(document, dataset)


def first_of_each_pair(collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """`collator`, but of a batch of pairs only the sequences to prefer, with their images: TRL puts them before all the
    others, in every tensor (trl 1.16)."""

    @wraps(collator)
    def collate(rows: list[Any]) -> Any:
        batch = collator([dict(row) for row in rows])  # TRL's collator for images changes its rows
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is None or len(ids) != 2 * len(rows):
            return batch
        return {name: value[: len(value) // 2] for name, value in batch.items() if isinstance(value, torch.Tensor)}

    return collate


class _View:
    """A map-style dataset through a function of its rows, called for the rows that are asked for."""

    def __init__(self, dataset: Any, document: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self.dataset = dataset
        self.document = document

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.document(self.dataset[index])


def main(argv: Sequence[str] | None = None) -> None:
    """TRL's SFT script, with GeLoRA's options beside its own: `gelora sft`.

    Takes what `trl/scripts/sft.py` takes, from the command line and from `--config file.yaml`, except that an unknown
    key of that file is an error, and `--dataset_name` may be a local JSON lines, CSV or Parquet file.

    Raises:
        GeLoRAError: an option cannot be used, or no ranks can be chosen.
    """
    parser = TrlParser([*sft.make_parser().dataclass_types, GeLoRAConfig], prog="gelora sft")
    try:
        script_args, training_args, model_args, dataset_args, config = parser.parse_args_and_config(argv)
    except GeLoRAError:
        raise
    except Exception as error:  # of the file, of YAML, of TRL's own checks
        raise ConfigError(f"The arguments, or the file of --config, cannot be used: {reason(error)}") from error
    if not model_args.use_peft:
        raise ConfigError("GeLoRA chooses the ranks of a LoRA adapter, and there will be none. Add --use_peft.")
    name = script_args.dataset_name
    if name and not dataset_args.datasets and Path(name).is_file() and Path(name).suffix in _FILES:
        # load_dataset(path) takes no data file (datasets 5.2); a mixture of one does.
        dataset_args.datasets = [DatasetConfig(path=_FILES[Path(name).suffix], data_files=name)]
        dataset_args.streaming, script_args.dataset_name = script_args.dataset_streaming, None
    _run_script(config, script_args, training_args, model_args, dataset_args)


def _run_script(config: GeLoRAConfig, *arguments: Any) -> None:
    """`trl.scripts.sft.main` with our trainer: it takes no callbacks, and imports its trainer when it is called."""
    home: Any = sft if hasattr(sft, "SFTTrainer") else trl
    if "SFTTrainer" not in sft.main.__code__.co_names:  # true of trl 1.9, 1.14 and 1.16
        raise GeLoRAError(
            f"The SFT script of trl {trl.__version__} makes its trainer in a way that GeLoRA does not know. Use "
            "GeLoRASFTTrainer in a script of your own (see examples/trl_sft.py)."
        )
    original = home.SFTTrainer

    def make_trainer(*args: Any, **kwargs: Any) -> SFTTrainer:
        home.SFTTrainer = original  # before anything else can take it for a class
        return GeLoRASFTTrainer(*args, gelora=config, **kwargs)

    home.SFTTrainer = make_trainer
    try:
        sft.main(*arguments)
    finally:
        home.SFTTrainer = original


if __name__ == "__main__":
    from gelora_plugins.integrations import trl as this  # under the name that the Trainer adapter imports it by

    this.main()
