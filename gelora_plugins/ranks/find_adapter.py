"""The LoRA adapter that a model has: where it is, what of it is free to get a rank, whether it is fresh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gelora_plugins.errors import ApplyError, LayoutError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.probe.find_blocks import unwrap
from gelora_plugins.ranks.pattern_keys import keys_ever
from gelora_plugins.ranks.patterns import matches_pattern, users_config
from gelora_plugins.ranks.plan import Site

# PEFT 0.21: every other `init_lora_weights` reads or rewrites the base weight, a second time if run again, or
# (False, "orthogonal") makes lora_B other than 0, so that a fresh adapter cannot be told from a trained one.
IN_PLACE_INITS = (True, "gaussian")
# PEFT 0.21: KaSA truncates the base weight whenever a layer is made, BD-LoRA goes by a name that `update_layer` is not
# given, Arrow holds other adapters.
NOT_IN_PLACE = ("kasa_config", "use_bdlora", "arrow_config")
CONFIG_ROUTE = (
    "Choose the ranks before the adapter is made: plan = select_ranks(model, rows, lora_config=config), then "
    "get_peft_model(model, with_plan(config, plan, model)) with gelora_plugins.with_plan, or "
    "GeLoRACallback(lora_config=config) on the model without an adapter."
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on a model: its name, its configuration, its layers by the name that PEFT's patterns match.

    That is the module path from the unwrapped model, and for a fused parameter `<module>.<parameter>`. The
    configuration is the user's, without the patterns of a plan that was applied to it.
    """

    model: nn.Module
    name: str
    config: LoraConfig
    layers: dict[str, LoraLayer]

    def sites(self, layout: ModelLayout) -> tuple[Site, ...]:
        """The blocks that have target modules whose rank is free to choose, in block order.

        Modules that the user's own `rank_pattern` or `alpha_pattern` names are the user's, and so are modules
        outside the blocks (embeddings, heads): they keep their rank and are not counted.

        Raises:
            LayoutError: no target module lies in a block.
        """
        sites = []
        for block in layout.blocks:
            layers = self.free_layers(block.name).values()
            if layers:
                sides = [min(layer.in_features, layer.out_features) for layer in layers if layer.in_features]
                sites.append(Site(block.name, sum(map(self._cost, layers)), max(sides, default=None)))
        if not sites:
            whole = {key for block in layout.blocks for key in keys_ever(block.name, inside=True)}
            if whole & set(self.config.rank_pattern):
                raise LayoutError(
                    "The adapter was made with the ranks of a plan (rank_pattern names whole blocks), and none of its "
                    f"{len(self.layers)} target modules is left to choose a rank for. Train it as it is, with "
                    "GeLoRACallback(plan=...) to check it, or make the adapter without the plan's patterns."
                )
            raise LayoutError(
                f"None of the {len(self.layers)} target modules of the adapter is free to get a rank: expected some "
                "in the transformer blocks that `rank_pattern` and `alpha_pattern` of your LoRA configuration leave "
                "open."
            )
        return tuple(sites)

    def _cost(self, layer: LoraLayer) -> int:
        """LoRA parameters of one rank; where the model is sharded the matrices are empty, and those of a linear map."""
        numel = sum(parameter.numel() for _, parameter in self.matrices(layer))
        return int(numel // layer.r[self.name] or layer.in_features + layer.out_features)

    def free_layers(self, block: str) -> dict[str, LoraLayer]:
        """The layers below `block` that no pattern of the user's names."""
        return {
            name: layer
            for name, layer in self.layers.items()
            if name.startswith(f"{block}.") and not matches_pattern(self.config, name)
        }

    def matrices(self, layer: LoraLayer) -> Iterator[tuple[str, Tensor]]:
        """(name within the layer, parameter) of everything whose shape follows the rank of this adapter."""
        for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            container: Any = getattr(layer, kind)
            if self.name in container:
                entry: Any = container[self.name]
                yield kind, getattr(entry, "weight", entry)

    def parameters(self, layer: LoraLayer) -> Iterator[tuple[str, nn.Parameter]]:
        """(name within the layer, parameter) of all that this adapter has there: matrices, biases, magnitudes."""
        for key, parameter in layer.named_parameters():
            container, name, *_ = key.split(".")
            if container != "base_layer" and name == self.name:
                yield key, parameter

    def check_fresh(self) -> None:
        """Raises ApplyError unless the ranks of this adapter can be changed in place."""
        if self.config.init_lora_weights not in IN_PLACE_INITS:
            raise ApplyError(
                f"init_lora_weights={self.config.init_lora_weights!r} cannot be run again on an adapter that exists; "
                f"in place GeLoRA takes {', '.join(map(repr, IN_PLACE_INITS))}. {CONFIG_ROUTE}"
            )
        for option in NOT_IN_PLACE:
            if getattr(self.config, option, None):
                raise ApplyError(f"{option} cannot be run again on an adapter that exists. {CONFIG_ROUTE}")
        if getattr(self.config, "alora_invocation_tokens", None) and not isinstance(self.model, PeftModel):
            raise ApplyError(
                "The adapter has alora_invocation_tokens, which do nothing outside a PeftModel (PEFT 0.21): nothing "
                "would be trained. Use get_peft_model(model, config) instead of model.add_adapter(config)."
            )
        if getattr(unwrap(self.model), "tp_size", None) not in (None, 1):
            raise ApplyError(f"The model is tensor-parallel; its adapter cannot be resized in place. {CONFIG_ROUTE}")
        for name, layer in self.layers.items():
            for kind, parameter in self.matrices(layer):
                if parameter.is_meta or parameter.numel() == 0:
                    raise ApplyError(f"{kind} of {name} is empty here: the model is sharded. {CONFIG_ROUTE}")
                if kind in ("lora_B", "lora_embedding_A") and bool(parameter.any()):
                    raise ApplyError(
                        f"The adapter is trained already: {kind} of {name} is not 0. GeLoRA chooses ranks before "
                        "training; train this adapter on without GeLoRA, or start from a fresh one."
                    )


def find_adapter(model: nn.Module) -> Adapter | None:
    """The active LoRA adapter of a PEFT model, or of a model with `add_adapter`; None when there is no adapter.

    Raises:
        ApplyError: the active adapter is not LoRA, several adapters are active, or the model is what a PeftModel holds.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) holds
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    if not configs:
        return None
    if not isinstance(model, PeftModel) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ApplyError(
            f"This {type(model).__name__} was given to get_peft_model before, which puts the adapter into the model "
            "itself (PEFT 0.21), or to a Trainer with GeLoRACallback(lora_config=...). Pass the PeftModel that came of "
            "it (trainer.model), or load the model again."
        )
    active = getattr(model, "active_adapters", None)
    names = list(active() if callable(active) else active or configs)
    if len(names) != 1:
        raise ApplyError(f"The adapters {', '.join(names)} are active; expected one. Activate the one to be trained.")
    config = configs[names[0]]
    if not isinstance(config, LoraConfig):
        raise ApplyError(f"The adapter {names[0]!r} is {config.peft_type}; GeLoRA chooses ranks for LoRA only.")
    layers = {
        _pattern_name(name, module): module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, LoraLayer) and names[0] in module.r
    }
    return Adapter(model, names[0], users_config(config), layers)


def _pattern_name(name: str, layer: LoraLayer) -> str:
    """What PEFT matches its patterns with: wrappers of fused parameters lie within each other (PEFT 0.21)."""
    parameter = getattr(layer, "parameter_name", None)
    return name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"


def require_adapter(model: nn.Module) -> Adapter:
    """`find_adapter`, or ApplyError when there is none."""
    adapter = find_adapter(model)
    inside = next((name for name, module in model.named_modules() if name and isinstance(module, PeftModel)), None)
    if adapter is None and inside is not None:
        raise ApplyError(
            f"The adapter is on `{inside}` of {type(model).__name__}, a module around a PeftModel, which GeLoRA does "
            f"not look into. Give it its ranks before: plan = select_ranks(model.{inside}, rows); "
            f"apply_plan(model.{inside}, plan); then train without GeLoRACallback."
        )
    if adapter is None or not adapter.layers:
        raise ApplyError(
            "The model has no LoRA adapter; expected one to give ranks to. Wrap it with get_peft_model(model, "
            "LoraConfig(...)), or pass GeLoRACallback(lora_config=LoraConfig(...)); with TRL pass peft_config."
        )
    return adapter
