"""What the training methods share: when they act, what they see, what they refuse, what a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from gelora_plugins.errors import ConfigError, MethodError, WriteError
from gelora_plugins.ranks.find_adapter import NOT_IN_PLACE, require_adapter
from gelora_plugins.ranks.held import check_held
from gelora_plugins.trainer_moment import Methods, checkpoint_path, replace_methods, trainer_being_made

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

SIDECAR = Path("gelora", "method.safetensors")  # below each checkpoint
# They step where no callback is told, or exchange the parameters for others when the model is evaluated.
OWN_STEPS = ("lomo", "schedulefree", "dummy")
FLAT = 1e-6  # of a norm; below it the direction of its gradient is rounding


class Pair(NamedTuple):
    """The LoRA matrices of one adapted linear map: y = W x + scaling · B A x.

    Attributes:
        name: the module's path, as PEFT's patterns match it.
        a, b: the Parameters, (r, in_features) and (out_features, r).
        layer: PEFT's module.
    """

    name: str
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    layer: LoraLayer


@dataclass(eq=False)
class TrainingMethod(TrainerCallback):  # type: ignore[misc]
    """A way of training LoRA: `Trainer(..., callbacks=[GeLoRACallback(), FlatLoRA()])`, or without GeLoRACallback.

    Its options are the fields of its class. The model is a plain PEFT model at every step boundary: what is evaluated
    or saved there, and what is left at the end, needs nothing of this package.

    A subclass writes `begin`, events of `transformers.TrainerCallback`, and what it needs of the methods after
    `begin`. From `begin` to `close` there are:

    Attributes:
        adapter, pairs: the active adapter, and its matrices in the order of the model.
        optimizer, scheduler: those that step; `scheduler` is a `torch.optim.lr_scheduler.LRScheduler`.
        args, state: the Trainer's.

    Raises:
        MethodError: at the start of training, for what the method cannot train.
    """

    name: ClassVar[str]  # in configurations, and of its arm in a comparison
    goes_with_others: ClassVar[bool] = False  # it touches neither the adapter nor its gradients
    chooses_ranks: ClassVar[bool] = False  # it decides which ranks stay; what it begins with is a budget
    fresh_only: ClassVar[bool] = False  # it wants lora_B to be 0
    inits: ClassVar[tuple[Any, ...] | None] = None  # `init_lora_weights` that it takes; None: all

    def __post_init__(self) -> None:
        self._trainer: weakref.ref[Trainer] | None = None
        self._resumed: str | None = None
        self._running = False

    # What a subclass writes.

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """Training is about to start. `saved` is what `saved` gave when the checkpoint that it resumes from was
        written, on the CPU; None at the start of a new training."""

    def finish(self) -> None:
        """Training is over, and the best checkpoint loaded where that was asked for: leave plain LoRA."""

    def close(self) -> None:
        """Training is over, well or badly: take away hooks, give back what was borrowed. Called after `begin` only."""

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the adapter and the optimizer, so that a resumed training is the same."""
        return {}

    def check(self) -> None:
        """Raises MethodError for what only this method refuses. Nothing has been changed yet."""

    def planned(self, ranks: Sequence[int], costs: Sequence[int]) -> tuple[Self, tuple[int, ...]]:
        """(the method, the ranks to begin with) that end with as many LoRA parameters as `ranks` has.

        Args:
            ranks: one for each site.
            costs: LoRA parameters of one rank there.
        """
        return self, tuple(ranks)

    # What stands once for all.

    def attach(self, trainer: Trainer) -> None:
        """Act in the trainings of `trainer`, which must have this callback. A second time does nothing."""
        if self._trainer is not None and self._trainer() is trainer:
            return
        for other in trainer.callback_handler.callbacks:
            if not isinstance(other, TrainingMethod) or other is self:
                continue
            if type(other) is type(self) or not (other.goes_with_others or self.goes_with_others):
                raise MethodError(
                    f"{other.name} and {self.name} both change how the adapter is trained. Give the Trainer one of "
                    "them."
                )
        self._trainer = weakref.ref(trainer)
        own = Methods(trainer.train, trainer.call_model_init, trainer.save_model, trainer.create_model_card)

        def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._resumed = checkpoint_path(trainer, resume_from_checkpoint)
            try:
                return own.train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._stop()

        def save_model(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
            own.save_model(output_dir, *args, **kwargs)
            if self._running and trainer.args.should_save:
                self._write(Path(output_dir or trainer.args.output_dir, SIDECAR))

        replace_methods(trainer, own._replace(train=train, save_model=save_model))

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Find the trainer that is being made: events are not told of a checkpoint, nor of the end of a failure."""
        self.attach(trainer_being_made(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look up the adapter, whose ranks are settled by now, and begin."""
        trainer = self._trainer() if self._trainer else None
        if trainer is None or trainer.state is not state:
            raise MethodError(
                f"{self.name} was added to a Trainer that exists already. Pass it when the Trainer is made: "
                f"Trainer(..., callbacks=[{type(self).__name__}()])."
            )
        self.args, self.state = args, state
        self.optimizer, self.scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        self._check_trainer(trainer)
        self.adapter = require_adapter(trainer.model)
        self.pairs = self._pairs()
        self._check_adapter()
        check_held(self.optimizer, self.adapter)
        self.check()
        saved = None if self._resumed is None else self._read(Path(self._resumed, SIDECAR))
        self._running = True
        self.begin(saved)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave plain LoRA."""
        if self._running:
            self.finish()
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            self.close()
            del self.adapter, self.pairs, self.optimizer, self.scheduler  # the callback may outlive the model

    def _check_trainer(self, trainer: Trainer) -> None:
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if sharded or getattr(trainer, "is_distributed_loading_by_transformers", False):
            raise MethodError(
                f"{self.name} needs whole matrices and their gradients in each process, which FSDP and DeepSpeed do "
                "not leave. Train in one process or with DDP, or without the method."
            )
        if trainer.args.n_gpu > 1:
            raise MethodError(
                f"{self.name} does not go with DataParallel, which the Trainer uses on {trainer.args.n_gpu} GPUs in "
                "one process. Start one process for each: torchrun --nproc_per_node ..."
            )
        if trainer.args.auto_find_batch_size:
            raise MethodError(
                f"auto_find_batch_size begins anew after a step that {self.name} has half made. Set "
                "per_device_train_batch_size to what fits."
            )
        if trainer.args.fp16:
            raise MethodError(f"{self.name} was not tried with fp16, whose scaled gradients it would see. Use bf16.")
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper
        kind = type(inner).__name__
        if any(word in kind.lower() for word in OWN_STEPS):
            raise MethodError(
                f"{self.name} does not go with {kind}, which steps out of its sight or exchanges the parameters. Use "
                "another optimizer, such as optim='adamw_torch'."
            )

    def _pairs(self) -> tuple[Pair, ...]:
        found = []
        for name, layer in self.adapter.layers.items():
            matrices: Any = dict(self.adapter.matrices(layer))
            if (
                set(matrices) != {"lora_A", "lora_B"}
                or matrices["lora_A"].dim() != 2
                or hasattr(layer, "parameter_name")
            ):
                raise MethodError(
                    f"{self.name} knows LoRA on linear maps; {name} is {type(layer).__name__} on "
                    f"{type(layer.get_base_layer()).__name__}. Leave it out of target_modules and target_parameters."
                )
            a, b = matrices["lora_A"], matrices["lora_B"]
            found.append(Pair(name, a, b, float(layer.scaling[self.adapter.name]), layer))
        return tuple(found)

    def _check_adapter(self) -> None:
        config = self.adapter.config
        for option in ("use_dora", "lora_bias", "alora_invocation_tokens", *NOT_IN_PLACE):
            if getattr(config, option, None):
                raise MethodError(f"{self.name} knows plain LoRA, and the adapter has {option}. Make it without.")
        if self.inits is not None and config.init_lora_weights not in self.inits:
            raise MethodError(
                f"{self.name} draws matrices as init_lora_weights of {' or '.join(map(repr, self.inits))} does; the "
                f"adapter has {config.init_lora_weights!r}."
            )
        for pair in self.pairs:
            if not (pair.a.requires_grad and pair.b.requires_grad):
                raise MethodError(f"{self.name} trains lora_A and lora_B; one of {pair.name} is frozen.")
            if self.fresh_only and self._resumed is None and bool(pair.b.any()):
                raise MethodError(
                    f"{self.name} begins with a fresh adapter, and lora_B of {pair.name} is not 0: it was trained. "
                    "Make a new one; a second `train()` goes on with resume_from_checkpoint only."
                )
        for pair in self.pairs:
            held = self.optimizer.state.get(pair.a, {}).get("exp_avg")
            if held is not None and held.shape != pair.a.shape:
                raise MethodError(
                    "The adapter has other ranks than the optimizer, which is that of a training before. Make another "
                    "Trainer."
                )

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def _write(self, path: Path) -> None:
        described = {"method": self.name, "options": json.dumps(self.options(), sort_keys=True)}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.saved().items()}
        temporary = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=described)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise WriteError(
                f"{path} cannot be written: {error}. The checkpoint is there, but {self.name} cannot resume from it. "
                "Make room and resume from the checkpoint before."
            ) from error

    def _read(self, path: Path) -> dict[str, Tensor]:
        if not path.is_file():
            raise MethodError(
                f"{os.fspath(path.parents[1])} has no {SIDECAR}: it is of a training without {self.name}, or was cut "
                "off. Resume from another checkpoint, or train without the method."
            )
        try:
            with safe_open(path, framework="pt") as file:
                described = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise MethodError(f"{path} cannot be read: {error}. Resume from the checkpoint before.") from error
        ours = json.dumps(self.options(), sort_keys=True)
        if (described.get("method"), described.get("options")) != (self.name, ours):
            raise MethodError(
                f"The checkpoint {path.parents[1]} is of {described.get('method')} with {described.get('options')}; "
                f"expected {self.name} with {ours}. Resume with the same, or start anew."
            )
        return tensors


def generator(seed: int, step: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of random numbers for one module at one step: the same in every process, and after resuming.

    The global state is not touched, so dropout and the order of the rows are those of plain LoRA.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def expect(right: bool, option: str, value: Any, expected: str) -> None:
    """Raises ConfigError unless `right`."""
    if not right:
        raise ConfigError(f"{option} is {value!r}; expected {expected}.")


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """d ||M M' - I|| / dM = 2 (M M' - I) M / ||M M' - I|| for M (r, n); 0 where the norm is 0, or only rounding.

    At least in float32.
    """
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    excess = rows @ rows.T
    excess.diagonal().sub_(1)
    norm = excess.norm()
    return torch.zeros_like(rows) if norm < FLAT else 2 * excess @ rows / norm


def forget(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Let `optimizer` start anew with these: it makes their state again in its next step.

    Not by zeroing: the state of 8-bit optimizers has maps of quantisation, too.
    """
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
