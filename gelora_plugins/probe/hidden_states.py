"""Hidden states at every block boundary, pooled inside the forward hooks to one point a document. Leaves no trace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import LayoutError, ProbeError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.probe.distributed import ALONE, Processes, blaming
from gelora_plugins.probe.documents import Batch, ProbeSet
from gelora_plugins.probe.find_blocks import HOW_TO_REGISTER, OWN_RANKS, unwrap
from gelora_plugins.probe.model_inputs import backbone_inputs, fit_mask, token_masks
from gelora_plugins.probe.no_trace import leaving_no_trace
from gelora_plugins.probe.point_store import FeatureStore, own_pages
from gelora_plugins.probe.progress import progress_bar

logger = logging.getLogger(__name__)

_TEXT = {"input_ids", "attention_mask", "token_type_ids", "labels", "decoder_input_ids", "decoder_attention_mask"}
Pooling = Callable[[Tensor, Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]
HOW_TO_MEASURE = (
    "GeLoRA calls the model without its head, with what the batch holds and without labels. If training gives it more, "
    "such as in a compute_loss of your own, give the model that as its default, or make a plan from rows that it takes "
    "and pass plan=..."
)

NOT_TOKENS = (
    "GeLoRA cannot measure blocks that pass on anything else than one vector for each token of the inputs, in their "
    f"order. {OWN_RANKS.removeprefix('Or ').capitalize()}"
)


def read_documents(
    model: nn.Module,
    layout: ModelLayout,
    probe_set: ProbeSet,
    pooling: Pooling,
    store: FeatureStore,
    config: GeLoRAConfig,
    *,
    stop: int | None = None,
    processes: Processes = ALONE,
    progress: bool = True,
    autocast: Autocast = nullcontext,
) -> int:
    """`collect_features` of the documents that `store` lacks, up to number `stop`.

    Where memory runs out, in any of the processes, the batches are halved and these documents are read again.

    Raises:
        ProbeError, LayoutError: see `collect_features`; or one document is more than memory takes.
    """
    start, size = store.num_filled, config.probe_batch_size

    def halve() -> int:
        nonlocal size
        if size == 1:
            raise ProbeError(
                "Memory ran out in a forward pass with one document. Lower probe_max_length (now "
                f"{config.probe_max_length}; it cuts text, not images or sounds), load the model in bfloat16 or 4 "
                "bits, or make the plan on a device with more memory and pass plan=..."
            )
        size //= 2
        logger.warning("Memory ran out while GeLoRA measured; trying again with %d documents in a batch.", size)
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)  # type: ignore[untyped-decorator]
    def read(batch_size: int) -> int:
        store.truncate(start)
        batches = probe_set.batches(batch_size, start, stop)
        total = -(-len(probe_set.documents[start:stop]) // batch_size)
        with progress_bar(batches, total=total, desc="GeLoRA probe", unit="batch", shown=progress) as bar:
            return collect_features(model, layout, bar, pooling, store, processes, autocast)

    return int(read())


def collect_features(
    model: nn.Module,
    layout: ModelLayout,
    batches: Iterable[Batch],
    pooling: Pooling,
    store: FeatureStore,
    processes: Processes = ALONE,
    autocast: Autocast = nullcontext,
) -> int:
    """Run `batches` through the backbone of `model`, pool what enters and leaves every block, and append it to `store`.

    Args:
        model: a model, or a PEFT model whose adapter does nothing yet.
        batches: inputs of the backbone; those it does not take (labels, say) are left out.
        pooling: (hidden (documents, tokens, features), mask (documents, tokens)) -> (documents, features).
        processes: those that share the batches out among them. The first one's `batches` and `store` count.
        autocast: what the forward passes run under, as they do in training.

    Returns:
        How many real tokens went through the backbone.

    Raises:
        ProbeError: a hidden state is not finite, or has another shape than (documents, tokens, features); or the
            backbone takes none of the inputs; or another process failed.
        LayoutError: a block was not called, or more than once, in a forward pass.
    """
    num_tokens = 0
    with reading(model, layout, pooling, autocast) as read:
        for batch in processes.share(batches):
            with processes.together():
                mine = None if batch is None else read(batch)
            gathered = processes.gather(mine)
            with processes.together():
                for points, tokens in gathered:
                    store.append(points)
                    num_tokens += tokens
    return num_tokens


@contextmanager
def reading(
    model: nn.Module, layout: ModelLayout, pooling: Pooling, autocast: Autocast = nullcontext
) -> Iterator[Callable[[Batch], tuple[list[Tensor], int]]]:
    """A function that gives the points of a batch, (documents, features) for each boundary, and its real tokens.

    The points are overwritten by those of the next batch. The forward pass runs under `autocast`; the pooling does not.
    """
    root = unwrap(model)
    backbone = root.get_submodule(layout.backbone)
    device = input_device(backbone)
    recorder = _Recorder(backbone, layout, pooling)

    def read(batch: Batch) -> tuple[list[Tensor], int]:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        with blaming(f"The forward pass of {type(backbone).__name__} with {shapes or 'no tensors'}", HOW_TO_MEASURE):
            return forward(batch)

    def forward(batch: Batch) -> tuple[list[Tensor], int]:
        inputs = {name: value.to(device) for name, value in batch.items()}
        arguments = backbone_inputs(root, backbone, inputs)
        if inputs.keys() <= _TEXT:  # a model that reads images as well replaces the ids that stand for them
            _check_ids(root, arguments)
        recorder.begin_batch(token_masks({**inputs, **arguments}, len(layout.stacks)))
        with autocast():
            backbone(**arguments)
        return recorder.end_batch()

    with ExitStack() as stack:
        stack.enter_context(leaving_no_trace(model))
        for handle in recorder.attach(root):
            stack.callback(handle.remove)
        if backbone is root:
            stack.callback(_shorten_head(root))
        yield read


def input_device(backbone: nn.Module) -> torch.device:
    """Where the inputs go: where the first parameters are, or where accelerate brings them when they are needed."""
    for module in backbone.modules():
        hook = getattr(module, "_hf_hook", None)  # accelerate 1.15: offloaded parameters are on "meta" between calls
        for part in getattr(hook, "hooks", [hook]):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(backbone.parameters()).device


def _shorten_head(model: nn.Module) -> Callable[[], None]:
    """Give the head of a model that is its own backbone, such as T5's, one token to read; gives what undoes that."""
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    if head is None:
        return lambda: None

    def one_token(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (args[0][:, :1], *args[1:]) if args and isinstance(args[0], Tensor) else None

    return head.register_forward_pre_hook(one_token).remove  # type: ignore[no-any-return]


def _check_ids(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raises ProbeError where a token id has no embedding: on a GPU that ends the process, on a CPU it names no id."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    count = getattr(embeddings, "num_embeddings", None)
    for name in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(name)
        if ids is None or not isinstance(count, int):
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            raise ProbeError(
                f"{name} has the token {low if low < 0 else high}, and the model's vocabulary the tokens 0 to "
                f"{count - 1}. Use the tokenizer that belongs to the model, or resize the model's embeddings for the "
                "tokens that were added (resize_token_embeddings)."
            )


class _Recorder:
    """Pools hidden states in forward hooks, so that no full hidden state outlives its block."""

    def __init__(self, backbone: nn.Module, layout: ModelLayout, pooling: Pooling) -> None:
        self.backbone = backbone
        self.layout = layout
        self.pooling = pooling
        self.masks: list[Tensor | None] = []
        self.seen = [False] * layout.num_boundaries
        self.points: list[Tensor | None] = [None] * layout.num_boundaries  # with room for the largest batch yet

    def attach(self, root: nn.Module) -> Iterator[Any]:
        boundary = 0
        for index, stack in enumerate(self.layout.stacks):
            first = root.get_submodule(stack[0].name)
            yield first.register_forward_pre_hook(self._before(boundary, index), with_kwargs=True)
            for block in stack:
                boundary += 1
                yield root.get_submodule(block.name).register_forward_hook(self._after(boundary, index))
            boundary += 1

    def _before(self, boundary: int, stack: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._record(boundary, stack, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _after(self, boundary: int, stack: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._record(boundary, stack, output[0] if isinstance(output, tuple) else output)

        return hook

    def _record(self, boundary: int, stack: int, hidden: Any) -> None:
        mask = self.masks[stack]
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else ()
        if mask is None and len(shape) == 3:
            mask = self.masks[stack] = torch.ones(shape[:2], dtype=torch.bool)
        elif mask is not None and len(shape) == 3 and mask.shape != shape[:2]:
            mask = self.masks[stack] = fit_mask(mask, shape[1], self.backbone)
        if mask is None or len(shape) != 3 or shape[:2] != mask.shape:
            expected = f" with documents and tokens {tuple(mask.shape)}" if mask is not None else ""
            raise ProbeError(
                f"The hidden state at boundary {boundary} is {shape or type(hidden).__name__}; expected (documents, "
                f"tokens, features){expected}. {NOT_TOKENS}"
            )
        if self.seen[boundary]:
            raise LayoutError(
                f"Boundary {boundary} was passed twice in one forward pass: blocks that are shared between layers "
                f"have no rank of their own. {HOW_TO_REGISTER}"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            points = self.pooling(hidden, mask.to(hidden.device)).float()
        if points.dim() != 2 or len(points) != len(mask):
            raise ProbeError(
                f"The pooling made points of shape {tuple(points.shape)} of {len(mask)} documents; expected "
                "(documents, features)."
            )
        bad = int((~points.isfinite()).any(dim=1).sum())
        if bad:
            raise ProbeError(
                f"The hidden state at boundary {boundary} is not finite for {bad} of {len(points)} documents. "
                "The model overflows in this dtype, or its weights are damaged; load it in bfloat16 or float32."
            )
        self._room(boundary, stack, points)[: len(points)] = points
        self.seen[boundary] = True

    def _room(self, boundary: int, stack: int, points: Tensor) -> Tensor:
        """Where points of this shape go. Made for the whole stack at its first boundary, before its forward pass is
        under way: even a tensor's header, left among its activations, would keep their room from being used again."""
        room = self.points[boundary]
        if room is None or room.shape[1] != points.shape[1] or len(room) < len(points):
            entered = boundary == sum(len(blocks) + 1 for blocks in self.layout.stacks[:stack])
            count = len(self.layout.stacks[stack]) + 1 if entered else 1
            rooms = own_pages((count, *points.shape), torch.float32).unbind()
            self.points[boundary : boundary + count] = rooms
            room = rooms[0]
        return room

    def begin_batch(self, masks: list[Tensor | None]) -> None:
        self.masks = masks
        self.seen = [False] * self.layout.num_boundaries

    def end_batch(self) -> tuple[list[Tensor], int]:
        missing = [boundary for boundary, seen in enumerate(self.seen) if not seen]
        if missing:
            raise LayoutError(
                f"Boundaries {missing} were not passed in the forward pass of the backbone. Where its blocks read what "
                "the rows lack, such as images, train on rows that have it, with the collator that makes a batch of "
                f"them. Otherwise leave those blocks out. {HOW_TO_REGISTER}"
            )
        masks = [mask for mask in self.masks if mask is not None]
        points = [room[: len(masks[0])] for room in self.points if room is not None]
        return points, sum(int(mask.sum()) for mask in masks)
