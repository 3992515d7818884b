"""README.md of a saved adapter: a tag and a section, added to what PEFT, TRL or the Trainer wrote there."""

from __future__ import annotations

import importlib.metadata
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from gelora_plugins.ranks.plan import PLAN
from gelora_plugins.ranks.verdict import verdict
from gelora_plugins.text import markdown

if TYPE_CHECKING:
    from gelora_plugins.ranks.plan import RankPlan

logger = logging.getLogger(__name__)

TAG = "gelora"
CARD = "README.md"
BEGIN, END = "<!-- gelora -->", "<!-- /gelora -->"  # of the section, to find it again
PICTURE, REPORT = PLAN.with_name("ranks.png"), PLAN.with_name("report.html")


def complete_card(directory: Path, plan: RankPlan | None) -> None:
    """Tag the model card in `directory` and tell of `plan` in it, in the place of what was told before.

    Without a plan, which is where the ranks are no longer those of one, what was told before goes. Nothing where there
    is no card. A card that cannot be read or written is a warning, and stays as it is.
    """
    path = directory / CARD
    if not path.is_file():
        return
    try:
        card = ModelCard.load(path)
        text = re.sub(rf"\n*{BEGIN}.*?{END}\n?", "\n", card.text, flags=re.DOTALL)
        if plan is not None:
            tags = card.data.tags or []
            tags = [tags] if isinstance(tags, str) else list(tags)
            card.data.tags = tags if TAG in tags else [*tags, TAG]
            text = f"{text.rstrip()}\n\n{BEGIN}\n{section(directory, plan)}{END}\n"
        if text != card.text or plan is not None:
            card.text = text
            card.save(path)
    except Exception as error:  # of YAML, of the card's own checks, of the disk
        logger.warning("%s was not completed with the ranks: %s: %s", path, type(error).__name__, error)


def section(directory: Path, plan: RankPlan) -> str:
    """The verdict, the picture if there is one, the ranks, how they were made, and how the adapter loads."""
    profile, version = plan.profile, importlib.metadata.version("gelora")
    picture = f"![Dimensions of the hidden states, and the ranks]({PICTURE.as_posix()})"
    lines = [
        "## LoRA ranks",
        markdown(verdict(plan)),
        *([picture] if (directory / PICTURE).is_file() else []),
        f"Ranks of the {len(plan.ranks)} blocks, the first to the last: {', '.join(map(str, plan.ranks))}. "
        f"{plan.num_parameters:,} LoRA parameters; {plan.num_base_parameters:,} with r = {plan.base_rank} everywhere.",
        f"Chosen by GeLoRA {version} from {profile.num_documents:,} documents of the training data: policy "
        f"{markdown(plan.policy)}, estimator {markdown(profile.estimator)}, pooling {markdown(profile.pooling)}.",
        "The adapter is plain LoRA with PEFT's `rank_pattern` and `alpha_pattern`. It loads without GeLoRA.",
        *([f"[The whole report]({REPORT.as_posix()})"] if (directory / REPORT).is_file() else []),
    ]
    return "".join(f"{line}\n\n" for line in lines)[:-1]
