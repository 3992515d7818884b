"""A training method from what a user writes in a configuration or a command: its name and its options."""

from __future__ import annotations

import inspect
import json
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from gelora_plugins import plugins
from gelora_plugins.errors import ConfigError

if TYPE_CHECKING:
    from gelora_plugins.methods.base import TrainingMethod


PYTHONS = {"True": True, "False": False, "None": None}  # as text they would count as given


def make_method(text: str) -> TrainingMethod:
    """The method that `text` names, as in "flat_lora sigma=0.1 mode=swap".

    Raises:
        ConfigError: there is none of that name, an option that it does not have, or one with a bad value.
    """
    name, *given = text.split() or [""]
    kind = plugins.find("method", name)
    known = list(inspect.signature(kind).parameters)
    options: dict[str, Any] = {}
    for assignment in given:
        option, equals, value = assignment.partition("=")
        if option not in known or not equals:
            near = get_close_matches(option, known, n=1)
            hint = f"Did you mean {near[0]}? " if near and near[0] != option else ""
            names = ", ".join(known) or "none"
            raise ConfigError(f"method {name} was given {assignment!r}. {hint}Expected option=value with: {names}.")
        options[option] = _value(value)
    try:
        made: TrainingMethod = kind(**options)
    except TypeError as error:  # a comparison of a number with text, for one
        raise ConfigError(f"method {name} cannot be made with {options}: {error}.") from error
    return made


def _value(text: str) -> Any:
    """A number, true, false or null as in JSON, or as in Python; else the text itself."""
    if text in PYTHONS:
        return PYTHONS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
