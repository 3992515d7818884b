"""The plugin manager: built at first use, never at import."""

from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from importlib.metadata import entry_points
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pluggy

from gelora_plugins import hookspecs
from gelora_plugins.errors import ConfigError, GeLoRAError, LayoutError, PluginError

if TYPE_CHECKING:
    from torch import nn

    from gelora_plugins.layout import ModelLayout

BUILT_INS = "gelora"  # name of the plugin that the package brings itself
_KINDS = {
    "estimator": "register_estimators",
    "pooling": "register_poolings",
    "policy": "register_rank_policies",
    "rank rule": "register_rank_rules",
    "method": "register_training_methods",
}


@lru_cache(maxsize=1)
def plugin_manager() -> pluggy.PluginManager:
    """The built-ins and every installed plugin of the entry point group `gelora`.

    Raises:
        PluginError: a plugin does not load, or has a hook that does not exist; it is named.
    """
    manager = pluggy.PluginManager("gelora")
    manager.add_hookspecs(hookspecs)
    manager.register(import_module("gelora_plugins.builtin"), BUILT_INS)  # by name, as those of others
    for entry in entry_points(group="gelora"):
        try:
            manager.register(entry.load(), entry.name)
            manager.check_pending()
        except Exception as error:
            raise PluginError(
                f"The gelora plugin {entry.name!r} ({entry.value}) does not load: {type(error).__name__}: {error}. "
                "Mend it, or uninstall the distribution that brings it."
            ) from error
    return manager


def find_layout(model: "nn.Module") -> "ModelLayout":
    """The layout that the first plugin to know the model gives.

    Raises:
        LayoutError: none does, or the search fails in code of the model or of a plugin.
    """
    try:
        layout: ModelLayout = plugin_manager().hook.find_model_layout(model=model)
    except GeLoRAError:
        raise
    except Exception as error:
        raise LayoutError(
            f"The search for the transformer blocks of {type(model).__name__} failed: {type(error).__name__}: {error}. "
            "Write a plugin with a `find_model_layout(model)` hook for it (see examples/plugin), or mend the one there "
            "is."
        ) from error
    return layout


def find(kind: str, name: str) -> Callable[..., Any]:
    """The estimator, pooling, policy, rank rule or training method of that name.

    Raises:
        ConfigError: there is none; the message lists what exists.
        PluginError: two plugins register one name.
    """
    known = available(kind)
    if name not in known:
        raise ConfigError(f"{kind} {name!r} does not exist; there are: {', '.join(sorted(known))}.")
    return known[name]


def available(kind: str) -> dict[str, Callable[..., Any]]:
    """All estimators, poolings, policies, rank rules or training methods by name.

    Raises:
        PluginError: two plugins register one name, or a hook fails; they are named.
    """
    manager = plugin_manager()
    owners: dict[str, str] = {}
    known: dict[str, Callable[..., Any]] = {}
    for implementation in getattr(manager.hook, _KINDS[kind]).get_hookimpls():
        try:
            functions = dict(implementation.function())
        except Exception as error:
            raise PluginError(
                f"{_KINDS[kind]} of the gelora plugin {implementation.plugin_name!r} fails: {type(error).__name__}: "
                f"{error}. Mend it, or uninstall the distribution that brings it."
            ) from error
        for name, function in functions.items():
            if name in known:
                raise PluginError(
                    f"The gelora plugins {owners[name]!r} and {implementation.plugin_name!r} both register the "
                    f"{kind} {name!r}. Rename one, or uninstall one of them."
                )
            owners[name] = implementation.plugin_name
            known[name] = _blamed(function, kind, name, owners[name])
    return known


def _blamed(function: Callable[..., Any], kind: str, name: str, owner: str) -> Callable[..., Any]:
    """`function`, whose unforeseen errors say whose it is; built-ins, and objects that are more than a function, as
    they are."""
    if owner == BUILT_INS or not isinstance(function, FunctionType):
        return function

    @wraps(function)
    def blamed(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            from accelerate.utils.memory import should_reduce_batch_size  # loads torch

            # Whoever called can do with less memory.
            if isinstance(error, GeLoRAError) or should_reduce_batch_size(error):
                raise
            raise PluginError(
                f"The {kind} {name!r} of the gelora plugin {owner!r} fails: {type(error).__name__}: {error}. Mend it, "
                f"or choose another {kind}."
            ) from error

    return blamed
