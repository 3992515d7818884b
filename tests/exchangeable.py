"""A model whose blocks can be exchanged: equal at first, and each adds its share to the same sum.

An allocation and its permutations then differ in the random draws of the adapters alone.
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


AutoConfig.register("exchangeable", ExchangeableConfig)
AutoModelForSequenceClassification.register(ExchangeableConfig, ExchangeableModel)


def build_exchangeable(num_labels: int) -> Any:
    """A model for regression with random weights, in evaluation mode; all its blocks have the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ExchangeableModel(ExchangeableConfig(num_labels=num_labels))
    for block in model.blocks:
        block.load_state_dict(model.blocks[0].state_dict())
    return model.eval()
