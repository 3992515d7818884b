"""GeLoRA in TRL: GeLoRASFTTrainer, and TRL's SFT script with it, `gelora sft`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from trl import SFTTrainer, TrlParser
from trl.scripts import sft
from trl.scripts.utils import DatasetConfig

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError, GeLoRAError
from gelora_plugins.methods.by_name import make_method
from gelora_plugins.mistakes import reason
from gelora_plugins.probe.formats import check_place, format_of, load_rows

from .transformers import GeLoRACallback, prepare_trainer

EXAMPLE = (
    "Example: gelora sft --model_name_or_path MODEL --dataset_name train.jsonl --use_peft --policy budget "
    "--output_dir out"
)


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


def main(argv: Sequence[str] | None = None) -> None:
    """TRL's SFT script, with GeLoRA's options beside its own: `gelora sft`.

    Takes what `trl/scripts/sft.py` takes, from the command line and from `--config file.yaml`, except that an unknown
    key of that file is an error, and `--dataset_name` may be a local JSON lines, CSV or Parquet file.

    Raises:
        GeLoRAError: an option cannot be used, or no ranks can be chosen.
    """
    parser = make_parser()
    try:
        config, script_args, training_args, model_args, dataset_args = parser.parse_args_and_config(argv)
    except GeLoRAError:
        raise
    except Exception as error:  # of the file, of YAML, of TRL's own checks
        raise ConfigError(f"The arguments, or the file of --config, cannot be used: {reason(error)}") from error
    if not model_args.use_peft:
        raise ConfigError("GeLoRA chooses the ranks of a LoRA adapter, and there will be none. Add --use_peft.")
    if config.method is not None:
        make_method(config.method)  # refused before a model is loaded
    name = script_args.dataset_name
    if name and not dataset_args.datasets:
        check_place(name)
    kind = format_of(Path(name)) if name and not dataset_args.datasets and Path(name).is_file() else None
    if kind is not None:
        if not script_args.dataset_streaming:
            load_rows(name, "train")  # a file that cannot be read is named, before a model is loaded
        # load_dataset(path) takes no data file (datasets 5.2); a mixture of one does.
        dataset_args.datasets = [DatasetConfig(path=kind, data_files=name)]
        dataset_args.streaming, script_args.dataset_name = script_args.dataset_streaming, None
    _run_script(config, script_args, training_args, model_args, dataset_args)


def make_parser() -> TrlParser:
    """GeLoRA's options, then those of TRL's script, which fill several pages."""
    return TrlParser(
        [GeLoRAConfig, *sft.make_parser().dataclass_types],
        prog="gelora sft",
        usage="gelora sft --model_name_or_path MODEL --dataset_name DATA --use_peft [options]",
        description="TRL's SFT script with LoRA ranks chosen from the data. GeLoRA's options come first, TRL's after.",
        epilog=EXAMPLE,
    )


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
    main()
