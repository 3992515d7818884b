"""Real trainings of a small model: what the plugin does, and what it leaves alone."""

import json

import pytest
from harness import HAS_ENTRY_POINTS, adapter_ranks, check_ranks, command
from safetensors import safe_open

from gelora_plugins.methods.base import SIDECAR

STEPS = 7  # the probe has 6 batches, and its progress bar must not be taken for that of the training
HIDDEN = """
import importlib.metadata as metadata
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gelora_plugins":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
distributions = metadata.Distribution.discover.__func__
metadata.Distribution.discover = classmethod(
    lambda cls, **kwargs: (d for d in distributions(cls, **kwargs) if d.metadata["Name"] != "gelora")
)
"""


@pytest.fixture(scope="module")
def killed(workplace):
    """A run that was killed after its first checkpoint."""
    return workplace.train_until_killed("interrupted", 3, max_steps=STEPS, save_steps=2)


@pytest.fixture(scope="module")
def plan(killed):
    """Its plan."""
    return killed.plan


def test_sample_packing_gives_the_same_plan(workplace, plan):
    run = workplace.train("packed", sample_packing=True, pad_to_sequence_len=True)
    assert run.returncode == 0, run.log
    assert run.plan.profile.num_documents == plan.profile.num_documents == 96
    assert run.plan.profile.data_fingerprint == plan.profile.data_fingerprint
    assert [e.value for e in run.plan.profile.estimates] == pytest.approx([e.value for e in plan.profile.estimates])
    assert run.plan.ranks == plan.ranks
    check_ranks(run.output_dir, run.plan)


def test_the_name_in_plugins_is_enough(workplace):
    run = workplace.train("bare", gelora=None)
    assert run.returncode == 0, run.log
    assert run.plan.policy == "gelora"
    check_ranks(run.output_dir, run.plan, base_rank=8)


def test_a_training_method_by_its_section(workplace):
    section = {"policy": "budget", "method": {"name": "cola", "knots": 2}}
    run = workplace.train("method", gelora=section, max_steps=4, save_steps=4)
    assert run.returncode == 0, run.log
    with safe_open(run.output_dir / "checkpoint-4" / SIDECAR, framework="pt") as file:
        described = file.metadata()
    assert (described["method"], json.loads(described["options"])["knots"]) == ("cola", 2)
    check_ranks(run.output_dir, run.plan, base_rank=8)


class TestResume:
    def test_killed_after_the_first_checkpoint(self, killed, plan):
        assert killed.returncode == -9, killed.log
        assert "GeLoRA probe" in killed.log
        assert not (killed.output_dir / "adapter_model.safetensors").exists()
        check_ranks(killed.output_dir / "checkpoint-2", plan)

    def test_by_path(self, workplace, killed, plan):
        """Into another directory, so that the interrupted one is as it was."""
        checkpoint = str(killed.output_dir / "checkpoint-2")
        run = workplace.train("resumed", max_steps=STEPS, resume_from_checkpoint=checkpoint)
        self.check(run, plan)
        assert run.plan == plan

    def test_automatically(self, workplace, killed, plan):
        saved = killed.output_dir / "gelora" / "plan.json"
        before = saved.stat().st_mtime_ns
        run = workplace.train(
            "continued", output_dir="interrupted", max_steps=STEPS, save_steps=2, auto_resume_from_checkpoints=True
        )
        self.check(run, plan)
        assert saved.stat().st_mtime_ns == before

    def check(self, run, plan):
        assert run.returncode == 0, run.log
        assert "GeLoRA probe" not in run.log
        assert "restored the ranks of the checkpoint" in run.log
        check_ranks(run.output_dir, plan)
        assert list(run.losses) == list(range(1, STEPS + 1))


# Axolotl 0.19 makes the adapter before it seeds anything, so no two of its runs are alike; olora draws nothing.
PLAIN = {"plugins": None, "gelora": None, "max_steps": 3} | (
    {} if HAS_ENTRY_POINTS else {"peft_init_lora_weights": "olora"}
)


@pytest.fixture(scope="module")
def installed(workplace):
    """A run whose configuration does not name the plugin."""
    return workplace.train("not-named", **PLAIN)


class TestNotNamed:
    def test_uniform_ranks_and_no_files(self, installed):
        assert installed.returncode == 0, installed.log
        assert set(adapter_ranks(installed.output_dir).values()) == {8}
        assert not (installed.output_dir / "gelora").exists()
        assert "GeLoRA probe" not in installed.log
        assert ("Plugin loaded successfully: gelora_plugins.GeLoRAPlugin" in installed.log) == HAS_ENTRY_POINTS

    def test_same_losses_as_without_gelora_installed(self, workplace, installed, tmp_path):
        (tmp_path / "sitecustomize.py").write_text(HIDDEN)
        env = {"PYTHONPATH": str(tmp_path)}
        hidden = workplace.train("hidden", **PLAIN, env=env)
        assert hidden.returncode == 0, hidden.log
        assert "gelora_plugins.GeLoRAPlugin" not in hidden.log  # the folder may be called gelora
        assert hidden.losses == installed.losses
        weights = [run.output_dir / "adapter_model.safetensors" for run in (hidden, installed)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_qlora(workplace):
    import torch
    from safetensors.torch import load_file

    run = workplace.train("qlora", adapter="qlora", load_in_4bit=True, save_steps=1)
    assert run.returncode == 0, run.log
    check_ranks(run.output_dir, run.plan)
    first = load_file(run.output_dir / "checkpoint-1" / "adapter_model.safetensors")
    last = load_file(run.output_dir / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    assert all((last[name] != first[name]).any() for name in last)


def test_dpo(workplace):
    texts = [json.loads(line)["text"] for line in (workplace.directory / "prose.jsonl").read_text().splitlines()]
    rows = [{"prompt": t[:60], "chosen": t[60:120], "rejected": t[120:180]} for t in texts]
    (workplace.directory / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    form = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
    datasets = [{"path": "preferences.jsonl", "ds_type": "json", "split": "train", "type": form}]
    run = workplace.train("dpo", rl="dpo", datasets=datasets)
    assert run.returncode == 0, run.log
    assert run.plan.profile.num_documents == 96
    check_ranks(run.output_dir, run.plan)


def test_an_adapter_that_exists_is_left_alone(workplace, killed, plan):
    run = workplace.train("further", lora_model_dir=str(killed.output_dir / "checkpoint-2"), max_steps=1)
    assert run.returncode == 0, run.log
    assert "GeLoRA is skipped: lora_model_dir is set" in run.log
    assert "GeLoRA probe" not in run.log
    check_ranks(run.output_dir, plan)
    assert not (run.output_dir / "gelora").exists()


@pytest.fixture(scope="module")
def shown(workplace, killed):
    """Of a configuration that does not name the plugin, but has its section."""
    path = workplace.write("shown", plugins=None)
    return command("gelora", path, "-o", "plan.json", cwd=workplace.directory, output_dir=workplace.directory / "shown")


class TestPlanKnownBefore:
    """`axolotl gelora`, and its two ways into a training."""

    def test_the_command_gives_the_plan_of_the_training(self, workplace, shown, plan):
        from gelora_plugins.ranks.plan import RankPlan

        assert shown.returncode == 0, shown.log
        made = RankPlan.load(workplace.directory / "plan.json")
        assert made.ranks == plan.ranks
        assert made.profile.data_fingerprint == plan.profile.data_fingerprint
        assert "LoRA ranks by GeLoRA" in shown.log
        assert not shown.output_dir.exists()

    def test_its_yaml_trains_without_the_plugin(self, workplace, shown, plan):
        import yaml

        printed = yaml.safe_load(shown.log.split("The same ranks without the plugin:")[1])
        assert list(printed) == ["lora_r", "lora_alpha", "lora_rank_pattern", "lora_alpha_pattern"]
        run = workplace.train("patterns", plugins=None, gelora=None, max_steps=1, **printed)
        assert run.returncode == 0, run.log
        check_ranks(run.output_dir, plan)

    def test_a_saved_plan_is_used_and_nothing_is_measured(self, workplace, shown, plan):
        """Also with an initialisation that would spoil the base weights if it were run twice."""
        run = workplace.train("planned", gelora={"plan": "plan.json"}, peft_init_lora_weights="olora", max_steps=1)
        assert run.returncode == 0, run.log
        assert "GeLoRA probe" not in run.log
        check_ranks(run.output_dir, plan)
        assert run.plan == type(plan).load(workplace.directory / "plan.json")

    def test_a_plan_for_another_model_stops_the_training(self, workplace, shown):
        run = workplace.train(
            "foreign", gelora={"plan": "plan.json"}, lora_target_linear=None, lora_target_modules=["q_proj"]
        )
        assert run.returncode != 0
        assert "The plan is for another model, or for other target modules" in run.log
        assert not list(run.output_dir.glob("checkpoint-*"))

    def test_a_sweep_in_one_process_gives_each_run_the_ranks_of_its_own_configuration(self, workplace, shown):
        import yaml

        from gelora_plugins.ranks.plan import RankPlan

        config = workplace.write("sweep", max_steps=1)
        sections = [{"plan": "plan.json"}, {"policy": "uniform", "probe_samples": 96}]
        (workplace.directory / "sections.yml").write_text(yaml.safe_dump({"gelora": sections}))
        ended = command("train", config, "--sweep", "sections.yml", "--launcher", "python", cwd=workplace.directory)
        assert ended.returncode == 0, ended.log
        found = {}
        for directory in (workplace.directory / "sweep").glob("sweep*"):
            plan = RankPlan.load(directory / "gelora" / "plan.json")
            check_ranks(directory, plan, base_rank=9)
            found[plan.policy] = plan.ranks
        assert found["uniform"] == (8,) * 4
        assert found["budget"] == RankPlan.load(workplace.directory / "plan.json").ranks


def test_a_failing_plugin_stops_the_training(workplace):
    datasets = [{"path": "few.jsonl", "ds_type": "json", "type": "completion"}]
    run = workplace.train("failing", datasets=datasets, launcher="accelerate")
    assert run.returncode != 0
    assert "distinct documents" in run.log
    assert "'loss'" not in run.log
    assert not list(run.output_dir.glob("checkpoint-*"))
    assert not (run.output_dir / "adapter_model.safetensors").exists()


def test_a_damaged_section_stops_before_the_model_is_loaded(workplace):
    run = workplace.train("damaged", gelora={"polcy": "budget"}, launcher="accelerate")
    assert run.returncode != 0
    assert "gelora.polcy is not an option. Did you mean gelora.policy?" in run.log
    assert "Loading weights" not in run.log
    assert not run.output_dir.exists()
