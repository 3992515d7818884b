"""Every error of GeLoRA: what was found, what was expected, what to do about it."""


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


class DimensionError(GeLoRAError):
    """An intrinsic dimension is needed and cannot be estimated."""


class PlanError(GeLoRAError, ValueError):
    """A saved record is damaged, or belongs to another model."""


class ApplyError(GeLoRAError):
    """The ranks of this adapter cannot be changed in place; nothing was changed."""


class TooLateError(GeLoRAError):
    """GeLoRA was attached when the optimizer, or training, already held the old parameters."""


class MethodError(GeLoRAError):
    """A training method cannot train this; nothing was changed."""


class ExportError(GeLoRAError):
    """A saved adapter cannot be given one rank for all modules; nothing was written."""


class WriteError(GeLoRAError, OSError):
    """A file cannot be written. The old one, if there was one, is as it was."""
