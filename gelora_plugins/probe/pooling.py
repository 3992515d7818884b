"""From the hidden states of a document to one point. A pooling takes (hidden, mask) and gives points.

hidden: (documents, tokens, features), any float dtype; mask: (documents, tokens) bool, True for real tokens, at least
one per document; result: (documents, features) float32.
"""

import torch
from torch import Tensor


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens, summed in float32. What stands at padding, NaN too, has no say."""
    total = hidden.masked_fill(~mask[:, :, None], 0).sum(dim=1, dtype=torch.float32)
    return total / mask.sum(dim=1, keepdim=True)


def first(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first real token: [CLS] of an encoder."""
    return _at(hidden, mask.int().argmax(dim=1))


def last(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last real token: the one that has seen the whole document, in a decoder."""
    tokens = mask.shape[1]
    return _at(hidden, tokens - 1 - mask.flip(1).int().argmax(dim=1))


def _at(hidden: Tensor, position: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), position].float()
