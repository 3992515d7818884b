"""Models whose blocks are planted: what each adapter of a block can do to the answer is known without training.

`ExchangeableModel`: blocks are equal at first, and each adds its share to the same sum, so that an allocation and its
permutations differ in the random draws of the adapters alone. `OneSeesModel`: linear, and only its last block sees the
input, so that the ranks of the others are spent on nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class ExchangeableConfig(PreTrainedConfig):
    model_type = "exchangeable"
    vocab_size: int = 97
    hidden_size: int = 32
    num_hidden_layers: int = 3


class ExchangeableModel(PreTrainedModel):
    config_class = ExchangeableConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
            for _ in range(config.num_hidden_layers)
        )
        self.classifier = nn.Linear(size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own stay: with those of `PreTrainedModel` the blocks would add next to nothing."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """`attention_mask` hides nothing: all rows of a task are to be of one length."""
        hidden = self.embed_tokens(input_ids)
        added = torch.stack([block(hidden) for block in self.blocks]).sum(0)
        logits = self.classifier((hidden + added).mean(1))
        loss = None if labels is None else nn.functional.mse_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class OneSeesConfig(PreTrainedConfig):
    model_type = "one_sees"
    hidden_size: int = 16
    num_hidden_layers: int = 3


class OneSeesModel(PreTrainedModel):
    """The answer is the last block's linear map of the shares of the tokens; it is 0 at first. There is no head."""

    config_class = OneSeesConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size, bias=False)) for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """`input_ids` are below `hidden_size`."""
        hidden = nn.functional.one_hot(input_ids, self.config.hidden_size).float().mean(1)
        *blind, last = self.blocks
        logits = last(hidden) + sum(block(0 * hidden) for block in blind)
        loss = None if labels is None else nn.functional.mse_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


for config, model in ((ExchangeableConfig, ExchangeableModel), (OneSeesConfig, OneSeesModel)):
    AutoConfig.register(config.model_type, config)
    AutoModelForSequenceClassification.register(config, model)


def build_exchangeable(num_labels: int) -> Any:
    """A model for regression with random weights, in evaluation mode; all its blocks have the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ExchangeableModel(ExchangeableConfig(num_labels=num_labels))
    for block in model.blocks:
        block.load_state_dict(model.blocks[0].state_dict())
    return model.eval()
