"""Where the weights of a model go that is loaded here, and in how many bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def accelerator() -> str:
    """The kind of accelerator of this machine, such as "cuda" or "mps"; "cpu" where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def four_bits(compute: torch.dtype, whole: Sequence[str] | None = None) -> BitsAndBytesConfig:
    """QLoRA's quantisation (arXiv 2305.14314): NF4, computed in `compute`.

    Args:
        whole: names of modules that keep their weights; None for the output head, as transformers has it.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=None if whole is None else list(whole),
    )
