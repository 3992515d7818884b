"""GeLoRA chooses LoRA ranks from the geometry of your data in your model. Importing this imports no torch."""

import importlib
import importlib.metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gelora_plugins.config import GeLoRAConfig
    from gelora_plugins.dimension.profile import DimensionEstimate, DimensionProfile
    from gelora_plugins.errors import GeLoRAError
    from gelora_plugins.hookspecs import hookimpl
    from gelora_plugins.integrations.axolotl import GeLoRAPlugin
    from gelora_plugins.integrations.own_loop import select_ranks
    from gelora_plugins.integrations.transformers import GeLoRACallback, prepare_trainer
    from gelora_plugins.integrations.trl import GeLoRASFTTrainer
    from gelora_plugins.layout import Block, Linear, ModelLayout
    from gelora_plugins.pipeline import measure
    from gelora_plugins.ranks.adapter import AppliedPlan, apply_plan
    from gelora_plugins.ranks.plan import RankPlan, Site
    from gelora_plugins.ranks.plan_check import check_plan, with_plan
    from gelora_plugins.report.rank_report import RankReport

_HOME = {
    "AppliedPlan": "ranks.adapter",
    "Block": "layout",
    "DimensionEstimate": "dimension.profile",
    "DimensionProfile": "dimension.profile",
    "GeLoRACallback": "integrations.transformers",
    "GeLoRAConfig": "config",
    "GeLoRAError": "errors",
    "GeLoRAPlugin": "integrations.axolotl",
    "GeLoRASFTTrainer": "integrations.trl",
    "Linear": "layout",
    "ModelLayout": "layout",
    "RankPlan": "ranks.plan",
    "RankReport": "report.rank_report",
    "Site": "ranks.plan",
    "apply_plan": "ranks.adapter",
    "check_plan": "ranks.plan_check",
    "hookimpl": "hookspecs",
    "measure": "pipeline",
    "prepare_trainer": "integrations.transformers",
    "select_ranks": "integrations.own_loop",
    "with_plan": "ranks.plan_check",
}
_NEEDS = {"GeLoRAPlugin": "axolotl", "GeLoRASFTTrainer": "trl"}  # frameworks that the package does without
__all__ = [
    "AppliedPlan",
    "Block",
    "DimensionEstimate",
    "DimensionProfile",
    "GeLoRACallback",
    "GeLoRAConfig",
    "GeLoRAError",
    "GeLoRAPlugin",
    "GeLoRASFTTrainer",
    "Linear",
    "ModelLayout",
    "RankPlan",
    "RankReport",
    "Site",
    "apply_plan",
    "check_plan",
    "hookimpl",
    "measure",
    "prepare_trainer",
    "select_ranks",
    "with_plan",
]


def __getattr__(name: str) -> Any:
    """Public names are imported at first use (PEP 562)."""
    if name == "__version__":
        return importlib.metadata.version("gelora")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEEDS and find_spec(_NEEDS[name]) is None:
        return _stand_in(name, _NEEDS[name])
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def _stand_in(name: str, framework: str) -> type:
    """A class in place of one whose framework is not installed: `import *`, `hasattr` and pydoc reach for every name.

    An AttributeError here would take the reason from `from gelora_plugins import ...`, and any other error ends those.
    """
    reason = f'{name} needs {framework}, which is not installed here: pip install "gelora[{framework}]".'

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise ImportError(reason)

    return type(name, (), {"__doc__": reason, "__init__": refuse, "__module__": __name__})


def __dir__() -> list[str]:
    return __all__
