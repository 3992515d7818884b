"""examples/axolotl.yml on the whole of SmolLM2: train, merge, compare."""

import subprocess
import sys

import pytest
import yaml
from harness import HAS_ENTRY_POINTS, PLUGIN, ROOT, check_ranks, command

STEPS = 12


@pytest.fixture(scope="module")
def example(model, tmp_path_factory):
    """The example as it stands, with less data, shorter, fewer steps, and the model where it is."""
    directory = tmp_path_factory.mktemp("example")
    subprocess.run([sys.executable, ROOT / "examples" / "axolotl_data.py", "prose.jsonl"], cwd=directory, check=True)
    text = (ROOT / "examples" / "axolotl.yml").read_text()
    config = yaml.safe_load(text)
    assert config["plugins"] == ["gelora"]
    if not HAS_ENTRY_POINTS:  # as the comment in that line says
        assert f"[{PLUGIN}]" in text
        config["plugins"] = [PLUGIN]
    config["gelora"]["probe_samples"] = 96
    config |= {"base_model": model, "sequence_len": 64, "dataset_num_proc": 1}
    (directory / "axolotl.yml").write_text(yaml.safe_dump(config))
    output_dir = directory / config["output_dir"]
    return command("train", "axolotl.yml", "--max-steps", STEPS, cwd=directory, output_dir=output_dir)


def test_saved_ranks_are_the_planned_ones(example):
    assert example.returncode == 0, example.log
    plan = example.plan
    assert len(plan.sites) == 30
    assert plan.policy == "budget"
    assert plan.profile.num_documents == 96
    check_ranks(example.output_dir, plan)
    check_ranks(example.output_dir / f"checkpoint-{STEPS}", plan)


def test_the_log_shows_the_plan(example):
    assert "LoRA ranks by GeLoRA" in example.log
    assert "Scaling 2 everywhere." in example.log
    assert example.log.count("LoRA ranks by GeLoRA") == 1
    names = {path.name for path in (example.output_dir / "gelora").iterdir()}
    assert {"plan.json", "report.json", "report.md", "report.html"} <= names


def test_the_loss_falls(example):
    losses = list(example.losses.values())
    assert len(losses) == STEPS
    assert sum(losses[STEPS // 2 :]) < sum(losses[: STEPS // 2]), losses


@pytest.mark.parametrize("bf16", [False, True])
def test_merged_model_gives_the_logits_of_the_adapter(example, model, bf16):
    """To float32's precision; in bfloat16 as nearly as bfloat16 can hold the merged weights at all."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = example.output_dir.parent
    config = yaml.safe_load((directory / "axolotl.yml").read_text())
    config |= {"bf16": bf16, "lora_model_dir": str(example.output_dir), "output_dir": f"merged-{bf16}"}
    (directory / "merge.yml").write_text(yaml.safe_dump(config))
    merge = command("merge-lora", "merge.yml", cwd=directory)
    assert merge.returncode == 0, merge.log
    dtype = torch.bfloat16 if bf16 else torch.float32

    def load(path):  # computed in float32 from what is stored, so that only the merged weights round
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).float()

    batch = AutoTokenizer.from_pretrained(model)(
        "The rank of a matrix is the dimension of its image.", return_tensors="pt"
    )
    with torch.no_grad():
        base = load(model)
        before = base(**batch).logits
        tuned = PeftModel.from_pretrained(base, example.output_dir)
        adapted = tuned(**batch).logits
        best = tuned.merge_and_unload().to(dtype).float()(**batch).logits
        merged = load(directory / f"merged-{bf16}" / "merged")(**batch).logits
    scale = adapted.abs().max()  # about 30
    error, best_error = (merged - adapted).abs().max() / scale, (best - adapted).abs().max() / scale
    assert (adapted - before).abs().max() > 0.1 * scale, "the adapter does next to nothing, so that this shows nothing"
    print(f"merged, bf16 {bf16}: {error:.1e} of the largest logit, best {best_error:.1e}")
    assert error <= (1.5 * best_error if bf16 else 1e-5)
