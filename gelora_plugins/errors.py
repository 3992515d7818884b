"""Every error of GeLoRA: what was found, what was expected, what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager


class GeLoRAError(Exception):
    """Base class; catch it to catch every error that GeLoRA raises on purpose."""


class ConfigError(GeLoRAError, ValueError):
    """An option has a value that cannot be used."""


class PluginError(GeLoRAError):
    """A plugin does not load, or two plugins claim one name."""


class LayoutError(GeLoRAError):
    """The transformer blocks of a model, or its target modules, cannot be found."""


class ProbeError(GeLoRAError):
    """The training data or the forward pass gives nothing to measure."""


@contextmanager
def blaming(what: str, advice: str) -> Iterator[None]:
    """Whatever the user's model or data raise inside becomes a ProbeError that says `what` failed, with its cause.

    Errors of GeLoRA stay as they are, and so does memory that ran out: whoever called may do with less.

    Raises:
        ProbeError: something failed; `advice` is its last sentence.
    """
    try:
        yield
    except GeLoRAError:
        raise
    except Exception as error:
        from accelerate.utils.memory import should_reduce_batch_size  # loads torch

        if should_reduce_batch_size(error):
            raise
        raise ProbeError(f"{what} failed: {type(error).__name__}: {str(error).rstrip('.')}. {advice}") from error


class DimensionError(GeLoRAError):
    """An intrinsic dimension is needed and cannot be estimated."""


class PlanError(GeLoRAError, ValueError):
    """A saved record is damaged, or belongs to another model."""


class ApplyError(GeLoRAError):
    """The ranks of this adapter cannot be changed in place; nothing was changed."""


class TooLateError(GeLoRAError):
    """GeLoRA was attached when the optimizer, or training, already held the old parameters."""


class ExportError(GeLoRAError):
    """A saved adapter cannot be given one rank for all modules; nothing was written."""


class WriteError(GeLoRAError, OSError):
    """A file cannot be written. The old one, if there was one, is as it was."""
