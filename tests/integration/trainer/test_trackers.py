"""Where people look while training: the plan's numbers in the tracker and in the history, once, and never its end."""

import statistics
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback
from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import TrainerState

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan
from gelora_plugins.report.rank_report import scalars
from gelora_plugins.report.table import COLUMNS, cells
from tests.support.plans import make_plan, plan_for
from tests.support.tiny import build
from tests.support.training import LORA, peft_model, ranks_by_block, saved_plan, trainer_for

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)  # half the time


@pytest.fixture
def boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    return tmp_path / "boards"


@pytest.fixture
def callback(tmp_path: Path) -> GeLoRACallback:
    plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA)).save(tmp_path / "plan.json")
    return GeLoRACallback(plan=str(tmp_path / "plan.json"))


def on_board(boards: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads of ours: (step, value) by name, from all runs."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(boards.rglob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return {name: values for name, values in found.items() if "gelora" in name}


def entries(state: TrainerState) -> list[dict[str, Any]]:
    return [entry for entry in state.log_history if "gelora/mean_rank" in entry]


def check_entry(state: TrainerState, plan: RankPlan) -> None:
    (entry,) = entries(state)
    assert entry["step"] == 0
    assert entry["gelora/ranks"] == list(plan.ranks)
    assert entry["gelora/dimensions"] == [estimate.value for estimate in plan.profile.estimates]
    assert {name: entry[f"gelora/{name}"] for name in scalars(plan)} == scalars(plan)


def test_tensorboard_and_the_history_have_the_plan_once(tmp_path: Path, boards: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(), report_to=["tensorboard"], **SAVING)
    trainer.train()
    plan = saved_plan(tmp_path)
    expected = scalars(plan)
    assert set(expected) == {"mean_rank", "parameters_share", "blocks_unsure", "seconds"}
    # TensorBoard keeps float32, whose rounding is 2**-24 of a value.
    assert on_board(boards) == {
        f"train/gelora/{name}": [(0, pytest.approx(value, rel=2**-23))] for name, value in expected.items()
    }
    check_entry(trainer.state, plan)
    check_entry(TrainerState.load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json")), plan)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_a_resumed_training_does_not_log_it_again(tmp_path: Path, boards: Path, callback: GeLoRACallback) -> None:
    trainer_for(peft_model(), tmp_path, callback, report_to=["tensorboard"], **SAVING).train()
    again = trainer_for(peft_model(), tmp_path, GeLoRACallback(), report_to=["tensorboard"], **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_entry(again.state, saved_plan(tmp_path))
    assert on_board(boards)["train/gelora/mean_rank"] == [(0, pytest.approx(13 / 3, rel=2**-23))]


def test_each_history_has_it(tmp_path: Path, callback: GeLoRACallback) -> None:
    trainer = trainer_for(peft_model(), tmp_path, callback)
    for _ in range(2):
        trainer.train()
        check_entry(trainer.state, saved_plan(tmp_path))


class Noted:
    """Takes what a tracker takes: every call with its arguments, by its name. What is asked for is true."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return (name, args, kwargs)

        return call


def with_tracker(tmp_path: Path, callback: GeLoRACallback, kind: type[TrainerCallback], handle: str) -> Noted:
    """A training with a tracker that is not installed here: what its package is given, by the calls of its own API."""
    tracker, noted = kind.__new__(kind), Noted()
    vars(tracker).update(
        {handle: noted, "_initialized": True, "_auto_end_run": False, "on_train_begin": lambda *args, **kwargs: None}
    )
    for moment in ("on_log", "on_save", "on_train_end"):
        setattr(tracker, moment, lambda *args, **kwargs: None)
    trainer = trainer_for(peft_model(), tmp_path, callback)
    trainer.add_callback(tracker)
    trainer.train()
    return noted


def check_picture(array: Any) -> None:
    assert (array.dtype, array.ndim, array.shape[2]) == ("uint8", 3, 4)
    assert array.std() > 10, "nothing is drawn"


# The calls as wandb 0.31, trackio 0.43 and mlflow 3.17 take them: benchmarks/trackers.py tries them on the real ones.


def test_wandb_and_trackio_get_the_table_and_the_picture(tmp_path: Path, callback: GeLoRACallback) -> None:
    for kind, handle in ((WandbCallback, "_wandb"), (TrackioCallback, "_trackio")):
        noted = with_tracker(tmp_path, callback, kind, handle)
        plan = saved_plan(tmp_path)
        ((shown,),) = [args for name, args, _ in noted.calls if name == "log"]
        assert set(shown) == {"gelora/plan", "gelora/picture", "train/global_step"}
        name, _, given = shown["gelora/plan"]
        assert name == "Table"
        rows = given["data"] if kind is WandbCallback else given["dataframe"].to_numpy().tolist()
        columns = given["columns"] if kind is WandbCallback else given["dataframe"].columns
        assert [tuple(row) for row in rows] == cells(plan)
        assert tuple(columns) == COLUMNS
        name, (array,), _ = shown["gelora/picture"]
        assert name == "Image"
        check_picture(array)


def test_mlflow_gets_the_table_and_the_picture(tmp_path: Path, callback: GeLoRACallback) -> None:
    calls = {name: args for name, args, _ in with_tracker(tmp_path, callback, MLflowCallback, "_ml_flow").calls}
    table, file = calls["log_table"]
    assert file == "gelora/plan.json"
    assert list(zip(*table.values(), strict=True)) == cells(saved_plan(tmp_path))
    array, file = calls["log_image"]
    assert file == "gelora/picture.png"
    check_picture(array)


def test_tensorboard_has_the_table_and_the_picture(tmp_path: Path, boards: Path, callback: GeLoRACallback) -> None:
    trainer_for(peft_model(), tmp_path, callback, report_to=["tensorboard"]).train()
    found = [EventAccumulator(str(file)).Reload() for file in sorted(boards.rglob("events.*"))]
    (table,) = [
        e.Tensors("gelora/plan/text_summary")[0] for e in found if "gelora/plan/text_summary" in e.Tags()["tensors"]
    ]
    text = table.tensor_proto.string_val[0].decode()
    assert "| block | dimension in | dimension out | rank | may differ | parameters |" in text
    (picture,) = [events.Images("gelora/picture")[0] for events in found if events.Tags()["images"]]
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert picture.width > picture.height > 100


class Down(TrainerCallback):
    """A tracker whose server is down when the plan comes."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "gelora/mean_rank" in logs:
            raise ConnectionError("the tracker is down")


def test_a_tracker_that_fails_is_a_warning(
    tmp_path: Path, callback: GeLoRACallback, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(peft_model(), tmp_path, callback)
    trainer.add_callback(Down())
    trainer.train()
    assert "The ranks were not logged everywhere: ConnectionError: the tracker is down" in caplog.text
    assert trainer.state.global_step == 3
    assert ranks_by_block(trainer.model) == [2, 6, 5]
    check_entry(trainer.state, saved_plan(tmp_path))


def test_a_trainer_that_logs_in_a_way_of_its_own_is_a_warning(
    tmp_path: Path, callback: GeLoRACallback, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Trainer = trainer_for(peft_model(), tmp_path, callback)
    original = trainer.log

    def log(logs: dict[str, float], *args: Any) -> None:
        logs["perplexity"] = logs.get("train_loss", 0.0) or logs["loss"]
        original(logs, *args)

    trainer.log = log
    trainer.train()
    assert "The ranks were not logged everywhere: KeyError: 'loss'" in caplog.text
    assert trainer.state.global_step == 3


def test_ranks_of_the_users_own_are_not_logged(tmp_path: Path) -> None:
    config = GeLoRAConfig(plan=str(tmp_path / "nothing.json"), on_failure="keep")
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(config))
    trainer.train()
    assert entries(trainer.state) == []


def test_what_is_logged_is_what_the_report_says() -> None:
    plan = make_plan(replicates=50, rank_changes=(0.0, 0.04, 0.05, 0.06, 0.5, 1.0))
    assert scalars(plan) == {
        "mean_rank": statistics.fmean(plan.ranks),
        "parameters_share": 616 / 2688,
        "blocks_unsure": 3,
        "seconds": 1.5,
    }
    assert "blocks_unsure" not in scalars(make_plan())
