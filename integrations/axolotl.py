"""GeLoRA in Axolotl: `plugins: [gelora]` (0.21 and later) or `plugins: [gelora_plugins.GeLoRAPlugin]`.

Axolotl 0.21 imports this module on every run of an environment that has gelora installed, so it imports nothing heavy
of ours, and every hook does nothing unless the configuration names the plugin.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin, PluginManager
from pydantic import BaseModel, Field, model_validator

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ApplyError, ConfigError, PlanError

if TYPE_CHECKING:
    from gelora_plugins.integrations.selection import RankSelection
    from peft import LoraConfig
    from transformers import Trainer

    from gelora_plugins.ranks.plan import RankPlan

logger = logging.getLogger(__name__)

SECTION = "gelora"  # of the configuration; also the short name of the plugin
ADAPTERS = ("lora", "qlora")
_SCHEMA = GeLoRAConfig.json_schema()
NAMES = (SECTION, "gelora_plugins.GeLoRAPlugin", f"{__name__}.GeLoRAPlugin")


class GeLoRAArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration. Axolotl mixes it into its own model."""

    gelora: dict[str, Any] | None = Field(
        default=None,
        json_schema_extra={
            "description": "Options of GeLoRA, which chooses the LoRA rank of every block.",
            "properties": _SCHEMA["properties"],
            "additionalProperties": _SCHEMA["additionalProperties"],
        },
    )

    @model_validator(mode="before")
    @classmethod
    def check_gelora(cls, data: Any) -> Any:
        """Refuse what can give no ranks before a model is loaded: a bad section, no LoRA adapter, no documents."""
        if isinstance(data, Mapping):
            check_documents(data, read_section(data))
            if data.get("adapter") not in ADAPTERS:
                raise ConfigError(
                    f"adapter is {data.get('adapter')!r}, and `plugins` lists gelora, which chooses LoRA ranks; "
                    f"expected one of: {', '.join(ADAPTERS)}. Set it, or remove gelora from `plugins`."
                )
        return data


class GeLoRAPlugin(BasePlugin):
    """Chooses the LoRA ranks from the training data, at the start of training, and applies them.

    Attributes:
        selection: the ranks of the trainer that was made, to be chosen when it trains.
        plan: the plan whose ranks the adapter was made with, where the configuration gives one.

    Axolotl 0.21 keeps the object from one configuration to the next (a sweep, a notebook): both are of the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selection: RankSelection | None = None
        self.plan: RankPlan | None = None
        self._schema: str | None = None
        # Axolotl 0.21 builds the plugins of the entry-point group before it resolves the configured names, and
        # resolves a name that is in this dictionary already to what is there. A second GeLoRAPlugin would run every
        # hook twice, hence a plugin that does nothing. Axolotl 0.19 never looks here.
        PluginManager().plugins.setdefault(SECTION, BasePlugin())

    def register(self, cfg: Any) -> None:
        """Called before validation, with the raw configuration: decides whether the section is read at all."""
        self.selection = self.plan = None
        self._schema = f"{__name__}.{GeLoRAArgs.__name__}" if self._serves(cfg) else None
        if cfg.get(SECTION) is not None and not is_named(cfg):
            logger.warning(
                "The configuration has a section `%s`, but `plugins` does not list gelora: all LoRA ranks stay lora_r.",
                SECTION,
            )

    def get_input_args(self) -> str | None:
        """The dotted name of GeLoRAArgs, when the configuration names the plugin."""
        return self._schema

    def get_lora_config_kwargs(self, cfg: Any) -> dict[str, Any]:
        """With `gelora: {plan: ...}`, PEFT makes the adapter with the plan's ranks and nothing is resized.

        That is also the way for sharded models (FSDP, DeepSpeed ZeRO-3) and for initialisations such as PiSSA.
        """
        self.plan = None  # of a configuration before, which may not have been registered
        if not self._serves(cfg) or cfg.get("lora_model_dir"):
            return {}
        config = read_section(cfg)
        if config.plan is None:
            return {}
        from gelora_plugins.ranks.plan import RankPlan
        from gelora_plugins.ranks.plan_check import with_plan

        try:
            plan = RankPlan.load(config.plan)
            planned = with_plan(lora_config(cfg), plan)
        except PlanError:
            if config.on_failure == "raise":
                raise
            return {}  # the trainer will say so, when it starts to train
        self.plan = plan
        return {"rank_pattern": planned.rank_pattern, "alpha_pattern": planned.alpha_pattern}

    def pre_model_load(self, cfg: Any) -> None:
        """A plan that cannot be read must not cost the loading of a model."""
        self.get_lora_config_kwargs(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        """Let the trainer choose its ranks when it starts to train.

        Not earlier: the LoRA kernels have rewritten the attention before this, and a forward pass in between fails
        (Axolotl 0.21: no attribute 'apply_qkv').
        """
        if not self._serves(cfg):
            return
        if cfg.get("lora_model_dir"):
            logger.warning(
                "GeLoRA is skipped: lora_model_dir is set, and the ranks of an adapter that exists are left as they "
                "are. Remove lora_model_dir to start a new adapter with chosen ranks."
            )
            return
        from gelora_plugins.integrations.sharding import is_sharded
        from gelora_plugins.integrations.transformers import prepare_trainer

        config = read_section(cfg)
        if config.plan is None and is_sharded(trainer) and config.on_failure == "raise":
            raise ApplyError(
                "The model will be sharded (FSDP or DeepSpeed ZeRO-3), and its adapter cannot be resized then. Make "
                "the plan before, in one process: axolotl gelora CONFIG.yml -o plan.json; then set "
                f"`{SECTION}: {{plan: plan.json}}`. To resume, use gelora/plan.json of the output directory."
            )
        # With a plan, whose ranks PEFT has made: compares them with the adapter, and changes nothing.
        self.selection = prepare_trainer(trainer, config)

    def _serves(self, cfg: Any) -> bool:
        """Whether the configuration names the plugin, and this instance is the one to act.

        Axolotl keeps one instance per name: on 0.21 the entry point's, and another for a longer dotted name.
        """
        first = next((p for p in PluginManager().plugins.values() if isinstance(p, GeLoRAPlugin)), self)
        return first is self and is_named(cfg)


def is_named(cfg: Mapping[str, Any]) -> bool:
    """Whether `plugins` of the configuration lists GeLoRA, under any of its names."""
    return any(str(name).replace(":", ".") in NAMES for name in cfg.get("plugins") or ())


def read_section(cfg: Mapping[str, Any]) -> GeLoRAConfig:
    """The options in the `gelora` section of an Axolotl configuration.

    Raises:
        ConfigError: an option does not exist, has a bad value, or names an estimator, pooling, policy or method
            that does not exist; the message begins with `gelora.<option>`.
    """
    from gelora_plugins import plugins

    section = cfg.get(SECTION)
    try:
        config = GeLoRAConfig.from_dict({} if section is None else section, where=SECTION)
        for kind in ("policy", "estimator", "pooling"):
            plugins.find(kind, getattr(config, kind))
        if config.method is not None:
            from gelora_plugins.methods.by_name import make_method  # loads torch

            make_method(config.method)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(SECTION) else f"{SECTION}.{message}") from None
    return config


def check_documents(cfg: Mapping[str, Any], config: GeLoRAConfig) -> None:
    """Raises ConfigError where there will be no documents to measure on, and no plan says the ranks."""
    rl = getattr(cfg.get("rl"), "value", cfg.get("rl"))
    # Axolotl 0.19 and 0.21: these trainers are GRPO's, except for EBFT's in its mode "strided", which reads text.
    writes = rl in ("gdpo", "grpo") or (rl == "ebft" and (cfg.get("ebft") or {}).get("mode") != "strided")
    if writes and config.plan is None and config.on_failure == "raise":
        raise ConfigError(
            f"rl is {rl}: it writes what it trains on while it trains, so there is nothing to measure before. Make a "
            "plan from documents that are like it (gelora probe MODEL DATA -o profile.json, then gelora plan "
            f"profile.json -o plan.json, with your lora_r and lora_alpha), and set `{SECTION}: {{plan: plan.json}}`."
        )


def lora_config(cfg: Mapping[str, Any]) -> LoraConfig:
    """What an Axolotl configuration says of ranks and scaling, without the patterns of a plan."""
    from peft import LoraConfig

    return LoraConfig(
        r=cfg["lora_r"],
        lora_alpha=cfg["lora_alpha"],
        use_rslora=bool(cfg.get("peft_use_rslora")),
        rank_pattern=dict(cfg.get("lora_rank_pattern") or {}),
        alpha_pattern=dict(cfg.get("lora_alpha_pattern") or {}),
    )
