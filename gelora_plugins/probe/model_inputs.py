"""What the backbone of a model reads of a batch, and which of its tokens are real."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gelora_plugins.errors import ProbeError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.probe.documents import IGNORED_LABEL, SEQUENCES_IN_A_ROW, Batch


def accepted_inputs(root: nn.Module, layout: ModelLayout) -> list[str]:
    """Names of the inputs that the backbone of `root`, an unwrapped model, takes."""
    return list(inspect.signature(root.get_submodule(layout.backbone).forward).parameters)


def backbone_inputs(root: nn.Module, backbone: nn.Module, batch: Batch) -> dict[str, Any]:
    """The arguments with which `backbone` is to be called for `batch`: what it takes, and its decoder's inputs.

    Raises:
        ProbeError: it takes none of the tensors, or needs inputs of its decoder that the batch does not give.
    """
    accepted = inspect.signature(backbone.forward).parameters
    # A model that is its own backbone, T5 with its head, would make a loss of the labels.
    given: dict[str, Any] = {name: value for name, value in batch.items() if name in accepted and name != "labels"}
    if not given:
        raise ProbeError(
            f"A batch has {', '.join(batch) or 'no tensors'}; expected inputs that {type(backbone).__name__} "
            f"takes, such as {', '.join(list(accepted)[:3])}."
        )
    if "input_ids" in given and given["input_ids"].dim() > 2:
        raise ProbeError(f"input_ids of a batch are {tuple(given['input_ids'].shape)}. {SEQUENCES_IN_A_ROW}")
    if "decoder_input_ids" in accepted and "decoder_input_ids" not in given:
        given |= _decoder_inputs(root, backbone, batch)
    elif "global_attention_mask" in accepted.keys() - given.keys() and backbone is not root:
        given |= _arguments(root, backbone, batch)  # Longformer's heads say which tokens attend to all
    if "use_cache" in accepted:
        given["use_cache"] = False
    return given


def _decoder_inputs(root: nn.Module, backbone: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the decoder of an encoder-decoder reads, made by the model itself: it shifts the labels by its own rule."""
    find_head: Any = getattr(root, "get_output_embeddings", lambda: None)
    shift: Any = getattr(root, "prepare_decoder_input_ids_from_labels", None)
    writes = shift is not None or find_head() is not None
    if ("labels" not in batch and writes) or (shift is None and backbone is root):
        raise ProbeError(
            f"{type(root).__name__} needs decoder inputs; expected `decoder_input_ids` in the batch, or `labels` "
            "and a model that can shift them (one with a language-model head)."
        )
    try:
        # Models fill ignored labels with the padding token themselves.
        made = {"decoder_input_ids": shift(labels=batch["labels"])} if shift else _arguments(root, backbone, batch)
    except (AttributeError, ValueError) as error:
        raise ProbeError(
            f"{type(root).__name__} cannot make its decoder's inputs: {str(error).rstrip('.')}. Set "
            "decoder_start_token_id and pad_token_id in its configuration, as for training."
        ) from error
    ids, labels = made.get("decoder_input_ids"), batch.get("labels")
    if "decoder_attention_mask" in batch:
        return made
    if writes and labels is not None:  # collators make no mask of the labels
        return {**made, "decoder_attention_mask": labels != IGNORED_LABEL}
    # The decoder of a classifier, BART's for example, reads the encoder's own tokens.
    mask = batch.get("attention_mask")
    same = mask is not None and (ids is None or ids.shape == mask.shape)
    return {**made, "decoder_attention_mask": mask} if same else made


class _ReachedError(Exception):
    """The forward pass came to the backbone."""


def _arguments(root: nn.Module, backbone: nn.Module, batch: Batch) -> dict[str, Any]:
    """What `root`, a model with a head, calls its backbone with; the backbone is not run, and no loss is made."""
    signature = inspect.signature(backbone.forward)
    found: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(signature.bind(*args, **kwargs).arguments)
        raise _ReachedError

    handle = backbone.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    accepted = inspect.signature(root.forward).parameters
    try:
        root(**{name: value for name, value in batch.items() if name in accepted})
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def token_masks(inputs: Batch, num_stacks: int) -> list[Tensor | None]:
    """For each stack which of its inputs are real: (documents, inputs) bool. None, as for images, means that all are.

    Raises:
        ProbeError: a document has none.
    """
    masks: list[Tensor | None] = []
    for prefix in ("", "decoder_")[:num_stacks]:
        mask = inputs.get(f"{prefix}attention_mask")
        if mask is None or mask.dim() != 2:
            ids = inputs.get(f"{prefix}input_ids")
            mask = None if ids is None else torch.ones_like(ids)
        masks.append(None if mask is None else _checked(mask.bool()))
    return masks


def fit_mask(mask: Tensor, num_tokens: int, backbone: nn.Module) -> Tensor:
    """`mask` (documents, inputs) for the tokens that the encoder of `backbone` makes of them: (documents, tokens).

    A model of speech makes a token of many samples, and says of how many; a model with attention in windows pads on
    the right to whole windows (transformers 5.23). Where neither is known the mask is as it was.
    """
    for module in backbone.modules():
        count: Callable[..., Tensor] | None = getattr(module, "_get_feat_extract_output_lengths", None)
        if count is not None and num_tokens < mask.shape[1]:
            # wav2vec 2.0 and its kin can have an adapter that shortens what leaves the last block.
            own = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}
            lengths = torch.as_tensor(count(mask.sum(dim=1), **own))
            return _checked(torch.arange(num_tokens) < lengths.cpu()[:, None])
        pads = hasattr(module, "_pad_to_window_size") or hasattr(module, "_pad_to_block_size")
        if pads and num_tokens > mask.shape[1]:
            return nn.functional.pad(mask, (0, num_tokens - mask.shape[1]))
    return mask


def _checked(mask: Tensor) -> Tensor:
    if not mask.any(dim=1).all():
        raise ProbeError("A document of the training data has no tokens; leave empty rows out.")
    return mask
