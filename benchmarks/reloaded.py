"""What a model says when its training has ended, and what its saved adapter says to PEFT alone, in another process.

    python benchmarks/reloaded.py MODEL ADAPTER ...

compares them; the first is in live.pt beside each adapter. `reloaded.LiveLogits` is a plugin of Axolotl that writes it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

try:
    from axolotl.integrations.base import BasePlugin
except ImportError:  # in an environment without Axolotl nobody needs the plugin
    BasePlugin = object

DOCUMENT = torch.arange(1000, 1064)[None]
LIVE = "live.pt"


def logits(model: Any) -> torch.Tensor:
    """(tokens, vocabulary) float32 on the CPU, of one document, without dropout."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=DOCUMENT.to(model.device)).logits[0].float().cpu()


class LiveLogits(BasePlugin):
    """Keeps what the trained model says; Axolotl calls it before it saves the adapter, and again after (0.21)."""

    def post_train(self, cfg: Any, model: Any) -> None:
        torch.save(logits(model), Path(cfg["output_dir"], LIVE))


def compare(base: Any, adapter: Path, alone: torch.Tensor) -> dict[str, Any]:
    """The largest differences of logits: of the trained model and the saved adapter, and of the adapter and none."""
    kind = json.loads((adapter / "adapter_config.json").read_text())["peft_type"]
    model = PeftModel.from_pretrained(base, str(adapter))
    found = logits(model)
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    model.unload()
    difference, moved = (found - torch.load(adapter / LIVE)).abs().max(), (found - alone).abs().max()
    return {"kind": kind, "parameters": parameters, "difference": difference.item(), "moved": moved.item()}


def main(name: str, *adapters: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    alone = logits(base)
    print(json.dumps([compare(base, Path(adapter), alone) for adapter in adapters]))


if __name__ == "__main__":
    main(*sys.argv[1:])
