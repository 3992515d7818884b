"""`gelora export`: an adapter of many ranks -> one that every server reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "gelora export out/checkpoint-500 served",
    "gelora export adapter served --rank-multiple 8",
)


def export(
    adapter: Annotated[Path, typer.Argument(help="Directory of a saved PEFT LoRA adapter.")],
    out: Annotated[Path, typer.Argument(help="New directory for the adapter that servers read.")],
    uniform: Annotated[
        bool, typer.Option("--uniform", hidden=True, help="What is written anyway: one rank for all modules.")
    ] = True,
    rank_multiple: Annotated[int, typer.Option(help="Round the rank up to a multiple of this.")] = 1,
) -> None:
    """Serve: an adapter of many ranks -> the same adapter with one, for SGLang, llama.cpp, Ollama. Needs no model."""
    from gelora_plugins.ranks.export import export_uniform

    done = export_uniform(adapter, out, rank_multiple=rank_multiple)
    typer.echo(f"{done.num_modules} modules with rank {done.rank} and lora_alpha {done.lora_alpha:g} -> {out}")
    if done.folded:
        typer.echo(f"The scaling of {len(done.folded)} modules differed and is in their lora_B now.")
