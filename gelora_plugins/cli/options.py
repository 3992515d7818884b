"""What the options of several commands share."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError

MOST_RANK = 2**16  # no linear map that is trained today has a longer side
AsJson = Annotated[
    bool, typer.Option("--json", help="The report as JSON on standard output, and nothing else; the rest on stderr.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error; warnings and errors stay.")]
_OPTIONS = {field.name: field for field in fields(GeLoRAConfig)}


def help_of(name: str) -> str:
    """The help of an option of GeLoRAConfig, for a terminal."""
    return str(_OPTIONS[name].metadata["help"]).replace("`", "")


def default_of(name: str) -> Any:
    """The default of an option of GeLoRAConfig."""
    return _OPTIONS[name].default


def listed(text: str, kind: Any) -> tuple[Any, ...]:
    """The values in `text`, which has commas between them."""
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of numbers with commas between them.") from error
