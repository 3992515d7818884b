"""The transformer blocks of any model of transformers: a generic finder, and what it looks through on its way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gelora_plugins.errors import LayoutError
from gelora_plugins.layout import Block, Linear, ModelLayout

if TYPE_CHECKING:
    from torch import nn

OWN_RANKS = 'Or train with ranks of your own: on_failure="keep" takes those of the LoRA configuration.'
HOW_TO_REGISTER = (
    "Write a plugin with a `find_model_layout(model)` hook that returns a ModelLayout for it "
    f"(see examples/plugin), and install it. {OWN_RANKS}"
)
SHARED_COUNT = re.compile(r"(num_)?(en|de)coder_.*layers")


def find_transformers_layout(model: nn.Module) -> ModelLayout:
    """The layout of a model of transformers: decoder, encoder or encoder-decoder, with or without a PEFT adapter.

    The blocks are the `ModuleList` with linear maps in it that has as many entries as the configuration beside it has
    layers; of a model that reads images as well, the one of its language model.

    Raises:
        LayoutError: no such list, or more than one, with what was found and how to register a layout.
    """
    root: Any = unwrap(model)
    config = getattr(root, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise LayoutError(f"{type(root).__name__} is not a model of transformers. {HOW_TO_REGISTER}")
    names = {module: name for name, module in root.named_modules()}
    backbone = root.base_model
    if getattr(config, "is_encoder_decoder", False):
        # A model with one of the two only, such as Whisper's audio classifier, gives itself for the other.
        parts = [part for part in (root.get_encoder(), root.get_decoder()) if part not in (root, backbone)]
    else:
        parts = [backbone.get_decoder()]  # an encoder gives itself
    stacks = tuple(_find_stack(root, names, part) for part in parts or [backbone])
    return ModelLayout(model_type=config.model_type, backbone=names[backbone], stacks=stacks)


def _find_stack(root: nn.Module, names: dict[nn.Module, str], part: nn.Module) -> tuple[Block, ...]:
    from torch import nn

    lists = {name: module for name, module in part.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    counts = {m: _layer_counts(root, names[m]) for m in outer}
    # Norms or convolutions of their own per layer may stand in lists of the same length. Two lists with linear maps
    # hold no blocks: XLM keeps the attention of all layers in one and the feed-forward nets in the other.
    found = [m for m in outer if len(m) in counts[m] and any(linears_of(m, ""))]
    if len(found) > 1:  # a tower for images within the part, as GIT has one
        found = [m for m in found if len(m) in _layer_counts(root, names[part])]
    if len(found) != 1:
        seen = ", ".join(f"{names[m]} ({len(m)})" for m in outer) or "none"
        wanted = sorted(set().union(*counts.values()) or _layer_counts(root, names[part]))
        raise LayoutError(
            f"The transformer blocks of {type(root).__name__} were not found: expected one list of "
            f"{' or '.join(map(str, wanted)) or 'its'} modules in {type(part).__name__}, found: {seen}. "
            f"{HOW_TO_REGISTER}"
        )
    return tuple(Block(names[block], tuple(linears_of(block, names[block]))) for block in found[0])


def _layer_counts(root: nn.Module, name: str) -> set[int]:
    """How many layers the configuration nearest to the module `name` says: one of several towers has its own.

    A configuration that encoder and decoder share, BART's for example, has both counts.
    """
    path = name.split(".")
    for length in range(len(path), -1, -1):
        config = getattr(root.get_submodule(".".join(path[:length])), "config", None)
        names = ["num_hidden_layers", *filter(SHARED_COUNT.fullmatch, getattr(config, "__dict__", ()))]
        counts = {getattr(config, name, None) for name in names}
        if counts != {None}:
            return {count for count in counts if isinstance(count, int)}
    return set()


def linears_of(module: nn.Module, prefix: str) -> Iterator[Linear]:
    """The linear maps below `module`: nn.Linear and its quantised kinds, GPT-2's Conv1D; adapters looked through."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    base: Any = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    base = base.get_base_layer() if isinstance(base, BaseTunerLayer) else base
    if isinstance(base, nn.Linear):
        yield Linear(prefix, base.in_features, base.out_features)
    elif isinstance(base, Conv1D):
        yield Linear(prefix, base.nx, base.nf)
    else:
        for name, child in base.named_children():
            yield from linears_of(child, f"{prefix}.{name}")


def unwrap(model: nn.Module) -> nn.Module:
    """The model that the user loaded: what PEFT's wrapper holds, or the model itself."""
    from peft import PeftModel

    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) holds
    return model.get_base_model() if isinstance(model, PeftModel) else model
