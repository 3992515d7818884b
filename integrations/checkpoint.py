"""What a checkpoint says of its ranks: the LoRA configuration that PEFT saved, and the plan beside it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from peft import LoraConfig, PeftConfig

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.pattern_keys import lies_inside
from gelora_plugins.ranks.plan import PLAN, RankPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that training resumes from.

    Attributes:
        path: its directory.
        config: the LoRA configuration that it was trained with; its ranks are what counts.
        plan: where those ranks came from; None for a checkpoint that GeLoRA had no part in.
    """

    path: str
    config: LoraConfig
    plan: RankPlan | None

    @classmethod
    def read(cls, path: str | os.PathLike[str], adapter_name: str) -> Self:
        """The checkpoint at `path`, as far as the adapter of this name goes.

        Raises:
            PlanError: it has no configuration of an adapter.
        """
        # PEFT saves an adapter of another name than "default" in a folder of its own; model.save_pretrained does not.
        places = [Path(path, adapter_name), Path(path)] if adapter_name != "default" else [Path(path)]
        place = next((place for place in places if (place / "adapter_config.json").is_file()), None)
        if place is None:
            raise PlanError(
                f"{os.fspath(path)} has no adapter_config.json, so the ranks that it was trained with are not known. "
                "Resume from a checkpoint that the Trainer wrote of a LoRA model and, if it was killed while it wrote "
                "this one, from the one before."
            )
        try:
            config = PeftConfig.from_pretrained(str(place))
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise PlanError(
                f"{place / 'adapter_config.json'} cannot be read ({error}): the Trainer may have been killed while it "
                "wrote it. Resume from the checkpoint before."
            ) from error
        if not isinstance(config, LoraConfig):
            raise PlanError(f"{place} holds a {config.peft_type} adapter; expected LoRA.")
        config.inference_mode = False  # PEFT saves True: an adapter made from it would be frozen
        return cls(os.fspath(path), config, _plan(Path(path), config))

    def lines(self, ranks: Mapping[str, int], options: GeLoRAConfig) -> Iterator[str]:
        """What is to be said: where the ranks come from, and which options they do not follow."""
        counts = Counter(ranks.values())
        shown = ", ".join(f"rank {rank} for {count} modules" for rank, count in sorted(counts.items()))
        origin = "" if self.plan else " No plan lies beside it, so it is not known how they were chosen."
        yield f"GeLoRA restored the ranks of the checkpoint {self.path}: {shown}. Nothing was measured.{origin}"
        differences = list(self._differences(options))
        if differences:
            yield (
                f"The options now are not those of the checkpoint, whose ranks stay: {'; '.join(differences)}. To "
                "choose ranks anew, start without resuming."
            )

    def _differences(self, options: GeLoRAConfig) -> Iterator[str]:
        if options.plan is not None:
            if not self._is_plan(options.plan):
                yield f"plan {options.plan} was not used"
        elif self.plan is None:
            yield f"policy {options.policy} was not used"
        else:
            for name, value in self.plan.followed().items():
                same = name == "policy" and value == options.on_unsure == "uniform"  # ranks that were not sure
                if getattr(options, name, value) != value and not same:
                    yield f"{name} is {getattr(options, name)}, the checkpoint's {value}"

    def _is_plan(self, path: str) -> bool:
        try:
            return self.plan is not None and RankPlan.load(path).ranks == self.plan.ranks
        except PlanError:
            return False


def _plan(path: Path, config: LoraConfig) -> RankPlan | None:
    """The plan beside a checkpoint, if it is one for these ranks: the configuration decides."""
    if not (path / PLAN).is_file():
        return None
    try:
        plan = RankPlan.load(path / PLAN)
        plan.check_scaling(config.r, config.lora_alpha, config.use_rslora)
    except PlanError as error:
        logger.warning("The plan beside the checkpoint is left out: %s", error)
        return None
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        # A block in which some modules are the user's has a key for each of the others.
        keys = [key for key in config.rank_pattern if lies_inside(key, site.name)]
        if rank not in {config.rank_pattern[key] for key in keys}:
            logger.warning("%s is left out: it is not the plan of the ranks in adapter_config.json.", path / PLAN)
            return None
    return plan
