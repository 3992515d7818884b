"""`gelora sft`: TRL's SFT script with GeLoRA's options."""

from __future__ import annotations

import typer


def sft(context: typer.Context) -> None:
    """TRL's SFT script with GeLoRA: its own arguments, and GeLoRA's beside them (gelora sft --help)."""
    from gelora_plugins.integrations import trl

    trl.main(context.args)
