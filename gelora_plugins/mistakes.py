"""What a command says of an error: a user's mistake is one sentence, a fault in the program a traceback."""

from typing import Any

from gelora_plugins.errors import GeLoRAError

# What reads users' files raises kinds of its own: a file that it cannot read is no fault of ours.
_READERS = {"datasets", "huggingface_hub", "json", "pandas", "pyarrow", "pydantic_core", "safetensors", "yaml"}
_EXTRAS = ("axolotl", "trl")  # of the distribution gelora


def sentence(error: Exception) -> str | None:
    """What to say of an error that a file, an option or an installation makes; None of a fault in the program."""
    if isinstance(error, GeLoRAError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("gelora_plugins"):
        extra = f' (pip install "gelora[{error.name}]")' if error.name in _EXTRAS else ""
        return f"This needs the package {error.name}, which is not installed here{extra}."
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, (OSError, EOFError, UnicodeError)) or kinds & _READERS:
        return reason(error)
    return None


def reason(error: BaseException) -> str:
    """What an error says, with its kind where that is not one of ours."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # which says what; the error says that there was one (datasets 5.2)
    if type(error).__module__.startswith("pydantic"):
        details: Any = getattr(error, "errors", list)()  # its own text shows the whole input as well
        return "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in details) or str(error)
    return str(error) if isinstance(error, GeLoRAError) else f"{type(error).__name__}: {error}"
