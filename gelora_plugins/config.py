"""GeLoRAConfig: the one definition of every option. Standard library only."""

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Self, get_args, get_type_hints

from gelora_plugins.errors import ConfigError

ROUNDINGS = ("nearest", "ceil", "floor", "dimensions")
ON_FAILURE = ("raise", "keep")
ON_UNSURE = ("warn", "uniform", "raise")
SCALINGS = ("constant", "equal_step")
MOST = 2**32 - 1  # of a count or a seed; numpy takes no larger seed
FEATURE_STORAGE = ("memory", "half", "disk")
CHOICES = {
    "rounding": ROUNDINGS,
    "scaling": SCALINGS,
    "on_failure": ON_FAILURE,
    "on_unsure": ON_UNSURE,
    "feature_storage": FEATURE_STORAGE,
}
JSON_TYPES = {str: "string", int: "integer", bool: "boolean", float: "number", type(None): "null"}


@dataclass(frozen=True)
class GeLoRAConfig:
    """Options of the rank selection. `HfArgumentParser` reads this class, so `help` is the documentation.

    Raises:
        ConfigError: a value is out of range. Names of estimators, poolings and policies are checked at use,
            because plugins may add to them.
    """

    policy: str = field(
        default="gelora",
        metadata={
            "help": "How dimensions become ranks: `gelora` (as published: growth of the dimension over the block, "
            "plus one), `budget` (the same relative need within the parameters that your own `r` costs) or "
            "`uniform` (your own `r`, or what `rank` says, everywhere, as a control)."
        },
    )
    estimator: str = field(
        default="twonn_mle",
        metadata={
            "help": "Estimator of the intrinsic dimension, each with a standard error: `twonn_mle` (TwoNN by censored "
            "maximum likelihood), `twonn` (TwoNN by linear fit), `gride` (ratios of the 2nd and 4th neighbour) or "
            "`mle` (Levina-Bickel, 10 neighbours)."
        },
    )
    pooling: str = field(
        default="mean",
        metadata={"help": "How the hidden states of a document become one point: `mean`, `last` or `first` token."},
    )
    rounding: str = field(
        default="nearest",
        metadata={
            "help": "How the policy `gelora` makes ranks whole: `nearest`, `ceil` or `floor` of the rank, or "
            "`dimensions` (each dimension rounded to the nearest integer first)."
        },
    )
    min_rank: int = field(
        default=1,
        metadata={
            "help": "No rank is chosen below this, except where the matrices of a block can hold no more. The policy "
            "`budget` takes it out of the same parameters."
        },
    )
    rank: int | str | None = field(
        default=None,
        metadata={
            "help": "What the policies `budget` and `uniform` spend in all, as the rank that costs it at every block: "
            "your own `r` if not given, a number, or a rule: `auto` (8: no rule that was measured beats it), `rows` "
            "(by the number of training rows), `tokens` (as many parameters as tokens to learn), `dimension_mean`, "
            "`dimension_max` or `dimension_last` (of the measured dimensions)."
        },
    )
    scaling: str = field(
        default="constant",
        metadata={
            "help": "What becomes of lora_alpha where a block has another rank than `r`: `constant` keeps lora_alpha / "
            "r the same everywhere, as published, so that a block of more ranks takes larger steps; `equal_step` keeps "
            "lora_alpha itself (what comes to the same with rank-stabilised LoRA), so that steps are as large at every "
            "rank."
        },
    )
    standardise: bool = field(
        default=False,
        metadata={
            "help": "Divide each coordinate of the points by its standard deviation before measuring, and leave "
            "constant coordinates out: for models in which a few large coordinates hide all others."
        },
    )
    probe_samples: int = field(
        default=1024,
        metadata={"help": "How many distinct training documents to measure on; fewer are used when fewer exist."},
    )
    probe_max_length: int = field(
        default=512, metadata={"help": "Tokens of a document that are read; what is longer is cut there."}
    )
    probe_batch_size: int = field(default=16, metadata={"help": "Documents in one forward pass of the probe."})
    probe_seed: int = field(default=0, metadata={"help": "Seed of the choice of documents."})
    target_std_error: float | None = field(
        default=None,
        metadata={
            "help": "Read documents in growing chunks, and stop once the growth of the dimension over every block is "
            "known to this standard error; `probe_samples` is the most that is read."
        },
    )
    feature_storage: str = field(
        default="memory",
        metadata={
            "help": "Where the points wait for the last document: `memory`, `half` (half the memory; moves the "
            "dimension by less than a hundredth of its standard error) or `disk` (temporary files, one boundary in "
            "memory at a time)."
        },
    )
    on_unsure: str = field(
        default="warn",
        metadata={
            "help": "When the data do not tell the blocks apart, or the estimator cannot say: `warn` says so and uses "
            "the ranks, `uniform` uses your own `r` everywhere, `raise` stops."
        },
    )
    method: str | None = field(
        default=None,
        metadata={
            "help": "How the adapter is trained, and with which options, as in `flat_lora sigma=0.1`; LoRA as it is if "
            "not given. See docs/methods."
        },
    )
    plan: str | None = field(
        default=None, metadata={"help": "Path of a saved plan. Its ranks are used and nothing is measured."}
    )
    on_failure: str = field(
        default="raise",
        metadata={
            "help": "When no ranks can be chosen: `raise` stops before training, `keep` warns and trains with the "
            "ranks of your own LoRA configuration."
        },
    )

    def __post_init__(self) -> None:
        counts = {"min_rank": 1, "probe_samples": 1, "probe_max_length": 1, "probe_batch_size": 1, "probe_seed": 0}
        for name, least in counts.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r:.80}; expected a whole number of at least {least}.")
            if value > MOST:
                raise ConfigError(f"{name} is more than {MOST}; expected a whole number of at most that.")
        self._check_rank()
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; expected one of: {', '.join(allowed)}.")
        for name in ("policy", "estimator", "pooling"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected the name of one, as a string.")
        if not isinstance(self.standardise, bool):
            raise ConfigError(f"standardise is {self.standardise!r}; expected true or false.")
        target = self.target_std_error
        if target is not None and not (
            isinstance(target, int | float) and not isinstance(target, bool) and 0 < target <= sys.float_info.max
        ):
            raise ConfigError(f"target_std_error is {target!r:.80}; expected a positive number, or nothing.")
        if self.plan is not None and not isinstance(self.plan, str):
            raise ConfigError(f"plan is {self.plan!r}; expected the path of a saved plan, as a string.")
        if self.method is not None and not isinstance(self.method, str):
            raise ConfigError(f"method is {self.method!r}; expected a name, and options after it, as a string.")

    def _check_rank(self) -> None:
        if isinstance(self.rank, str) and self.rank.strip().isdecimal():  # as a command line has it
            object.__setattr__(self, "rank", int(self.rank))
        wrong = not isinstance(self.rank, int | str | None) or isinstance(self.rank, bool) or not str(self.rank).strip()
        if wrong or (isinstance(self.rank, int) and not 1 <= self.rank <= MOST):
            raise ConfigError(f"rank is {self.rank!r:.80}; expected a whole number from 1, or the name of a rule.")
        if self.rank is not None and self.policy == "gelora":
            raise ConfigError(
                f"rank is {self.rank!r}, and the policy 'gelora' takes its ranks from dimensions alone. Add policy "
                "'uniform' (that rank at every block) or 'budget' (what it costs, by need), or leave rank out."
            )

    @classmethod
    def from_dict(cls, options: dict[str, Any], *, where: str = "gelora") -> Self:
        """Build from a mapping, such as a section of a YAML file; `where` names that section in errors.

        Raises:
            ConfigError: an option does not exist (the nearest name is suggested) or has a bad value.
        """
        if not isinstance(options, dict):
            raise ConfigError(f"{where} is {options!r}; expected a mapping of options.")
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {where}.{near[0]}? " if near else ""
                raise ConfigError(f"{where}.{name} is not an option. {hint}The options are: {', '.join(known)}.")
        if isinstance(options.get("method"), dict):
            options = {**options, "method": _words(options["method"], where)}
        return cls(**options)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of what `from_dict` takes, as far as it is the same everywhere: plugins add names."""
        properties = {}
        types = get_type_hints(cls)  # HfArgumentParser changes those of the fields (transformers 5.23)
        for option in fields(cls):
            kinds = [JSON_TYPES[kind] for kind in get_args(types[option.name]) or (types[option.name],)]
            properties[option.name] = {
                "type": kinds[0] if len(kinds) == 1 else kinds,
                "default": option.default,
                "description": option.metadata["help"],
                **({"enum": list(CHOICES[option.name])} if option.name in CHOICES else {}),
            }
        properties["method"]["type"] = ["string", "object", "null"]  # by name and words, or a mapping of them
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values."""
        return asdict(self)

    def measured(self) -> dict[str, Any]:
        """The options that the ranks follow, for the record: all but those on how, and whether, to get at them."""
        how = ("method", "plan", "on_failure", "probe_batch_size", "feature_storage")
        return {name: value for name, value in self.to_dict().items() if name not in how}


def _words(method: dict[str, Any], where: str) -> str:
    """ "flat_lora sigma=0.1" of {name: flat_lora, sigma: 0.1}."""
    options = dict(method)
    words = [str(options.pop("name", ""))]
    words += [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    if any(len(word.split()) != 1 for word in words):
        raise ConfigError(f"{where}.method is {method!r}; expected a mapping of `name` and the method's options.")
    return " ".join(words)
