"""What the uniform export refuses, and what it leaves behind when it fails. Made of files, without a model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gelora_plugins.errors import ConfigError, ExportError, GeLoRAError, PlanError, WriteError
from gelora_plugins.ranks import export
from gelora_plugins.ranks.export import export_uniform

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q"],
    "rank_pattern": {},
    "alpha_pattern": {},
}
Q, V = "base_model.model.h.0.q", "base_model.model.h.1.q"


def pair(name: str, rank: int, experts: int = 1) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_A.weight": torch.ones(rank * experts, 3),
        f"{name}.lora_B.weight": torch.ones(5, rank * experts),
    }


def adapter(directory: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors or {**pair(Q, 2), **pair(V, 3)}, directory / "adapter_model.safetensors")
    return directory


def refused(tmp_path: Path, source: Path, error: type[GeLoRAError] = ExportError) -> str:
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(error) as caught:
        export_uniform(source, tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == before
    return str(caught.value)


def test_two_ranks_become_one(tmp_path: Path) -> None:
    done = export_uniform(adapter(tmp_path / "many"), tmp_path / "below" / "one", rank_multiple=4)
    assert (done.rank, done.lora_alpha, done.num_modules) == (4, 8, 2)
    assert done.folded == (V,)
    assert sorted(os.listdir(tmp_path / "below")) == ["one"]
    assert sorted(os.listdir(tmp_path / "below" / "one")) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "below" / "one" / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in tensors.values()} == {(4, 3), (5, 4)}


def test_dtypes_and_the_files_own_metadata_are_kept(tmp_path: Path) -> None:
    tensors = {key: value.bfloat16() for key, value in {**pair(Q, 2), **pair(V, 3)}.items()}
    source = adapter(tmp_path / "many", tensors)
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt", "run": "7"})
    done = export_uniform(source, tmp_path / "one")
    assert done.folded == (V,)  # 4 / 3 becomes 2
    with safe_open(tmp_path / "one" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "run": "7"}
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
        folded = file.get_tensor(f"{V}.lora_B.weight")
    assert torch.equal(folded, torch.full((5, 3), 2 / 3).bfloat16())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "ADALORA"}, ["'ADALORA'", "expected 'LORA'"]),
        ({"peft_type": "IA3"}, ["'IA3'", "expected 'LORA'"]),
        ({"use_dora": True}, ["use_dora", "merge_and_unload"]),
        ({"use_qalora": True}, ["use_qalora", "merge_and_unload"]),
        ({"arrow_config": {"top_k": 3}}, ["arrow_config", "merge_and_unload"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'", "path_initial_model_for_weight_conversion"]),
        ({"init_lora_weights": "loftq"}, ["'loftq'", "merge_and_unload"]),
        ({"lora_alpha": "4"}, ["must be numbers"]),
        ({"lora_alpha": None}, ["must be numbers"]),
        ({"rank_pattern": {"q": None}}, ["must be numbers"]),
        ({"alpha_pattern": [1]}, ["must be numbers"]),
        ({"lora_alpha": 10**400}, ["must be numbers, none above"]),
        ({"lora_alpha": 1e300}, ["must be numbers, none above"]),
        ({"target_parameters": [1]}, ["target_parameters [1]", "a list of names"]),
        ({"target_parameters": "experts"}, ["target_parameters 'experts'", "a list of names"]),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    said = refused(tmp_path, adapter(tmp_path / "many", **config))
    assert str(tmp_path / "many" / "adapter_config.json") in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("(q|qq)+$x", "regex timed out"),
        ("(h|h.)*(q|.q|qq)+!", None),
        ("(", "missing )"),
        ("q" * 100 + "[", "unterminated"),
    ],
)
def test_a_pattern_that_cannot_be_matched_is_refused_and_hangs_nothing(
    tmp_path: Path, key: str, said: str | None
) -> None:
    source = adapter(tmp_path / "many", pair("h.0." + "q" * 60, 2), alpha_pattern={key: 8})
    if said is None:
        assert export_uniform(source, tmp_path / "one").lora_alpha == 4
    else:
        found = refused(tmp_path, source)
        assert f"has the pattern {key!r:.80}, which cannot be matched with h.0.q" in found
        assert said in found


def test_an_adapter_with_a_name_of_its_own_is_pointed_to(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    for name in ("other", "mine"):
        adapter(tmp_path / "saved" / name)
    named = " or ".join(str(tmp_path / "saved" / name) for name in ("mine", "other"))
    assert refused(tmp_path, tmp_path / "saved").endswith(f"expected an adapter's own directory, as {named} is.")
    assert export_uniform(tmp_path / "saved" / "mine", tmp_path / "one").rank == 3


def test_a_link_to_nothing_is_not_written_to(tmp_path: Path) -> None:
    source = adapter(tmp_path / "many")
    (tmp_path / "one").symlink_to(tmp_path / "nothing")
    assert f"one is a link to {tmp_path / 'nothing'}, which is not there" in refused(tmp_path, source)


@pytest.mark.parametrize("place", ["a file/one", "a link to nothing/one"])
def test_a_place_that_cannot_be_made_is_an_error(tmp_path: Path, place: str) -> None:
    source = adapter(tmp_path / "many")
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "a link to nothing").symlink_to(tmp_path / "nothing")
    with pytest.raises(WriteError, match=f"{place} cannot be written: "):
        export_uniform(source, tmp_path / place)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff"])
def test_a_configuration_that_is_no_json(tmp_path: Path, text: str | bytes) -> None:
    source = adapter(tmp_path / "many")
    (source / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "is not JSON" in refused(tmp_path, source, PlanError)


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_a_configuration_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    source = adapter(tmp_path / "many")
    (source / "adapter_config.json").write_text(text)
    assert "expected 'LORA'" in refused(tmp_path, source)


def test_patterns_that_are_null_are_none(tmp_path: Path) -> None:
    source = adapter(tmp_path / "many", rank_pattern=None, alpha_pattern=None)
    assert export_uniform(source, tmp_path / "one").rank == 3


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    source = adapter(tmp_path / "many")
    (source / missing).unlink()
    assert f"has no {missing}; expected the directory that save_pretrained" in refused(tmp_path, source)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    source = adapter(tmp_path / "many")
    (source / "adapter_model.safetensors").unlink()
    (source / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    said = refused(tmp_path, source)
    assert "a pickle, which is not opened" in said
    assert "save_pretrained writes safetensors" in said


@pytest.mark.parametrize("length", [0, 7, 100])
def test_a_truncated_file_of_matrices(tmp_path: Path, length: int) -> None:
    source = adapter(tmp_path / "many")
    path = source / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert f"{path} cannot be read: " in refused(tmp_path, source)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x.weight": torch.ones(2)}, ["has no LoRA matrices"]),
        ({**pair(Q, 2), f"{Q}.lora_magnitude_vector": torch.ones(5)}, [f"{Q}.lora_magnitude_vector", "plain LoRA"]),
        ({f"{Q}.lora_A.weight": torch.ones(2, 3)}, [f"{Q} has only {Q}.lora_A.weight"]),
        ({**pair(Q, 2), f"{Q}.lora_B.weight": torch.ones(5, 1)}, [Q, "(2, 3)", "(5, 1)", "Sharded"]),
        ({**pair(Q, 2), f"{Q}.lora_A.weight": torch.ones(0)}, [Q, "(0,)", "Sharded"]),
    ],
    ids=["none", "another kind", "half a pair", "grouped", "sharded"],
)
def test_matrices_that_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], words: list[str]) -> None:
    said = refused(tmp_path, adapter(tmp_path / "many", tensors))
    for word in words:
        assert word in said


def test_fused_experts_whose_rank_the_files_do_not_say_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.h.0.experts"
    tensors = {**pair(name, 2, experts=4), **pair(f"{name}.base_layer", 2, experts=4)}
    options = {"target_parameters": ["experts.up", "experts.down"], "rank_pattern": {"h.0.experts.up": 4}}
    said = refused(tmp_path, adapter(tmp_path / "many", tensors, **options))
    assert "h.0.experts.up, h.0.experts.down have the ranks 4, 2" in said
    options["rank_pattern"] = {r"h\.0\.experts\..*": 3}
    assert "lora_A has 8 rows" in refused(tmp_path, adapter(tmp_path / "other", tensors, **options))


def test_a_scaling_is_not_put_into_tied_matrices(tmp_path: Path) -> None:
    source = adapter(tmp_path / "many", ensure_weight_tying=True)
    assert "ensure_weight_tying shares matrices" in refused(tmp_path, source)


@pytest.mark.parametrize("kind", ["a file in it", "a file"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    source, out = adapter(tmp_path / "many"), tmp_path / "one"
    if kind == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    assert f"{out} is there already; expected a new or an empty directory." in refused(tmp_path, source)
    assert (out if kind == "a file" else out / "mine").read_text() == "mine"
    with pytest.raises(ExportError, match="is there already"):
        export_uniform(source, source)


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    export_uniform(adapter(tmp_path / "many"), tmp_path / "one")
    assert len(os.listdir(tmp_path / "one")) == 2


@pytest.mark.parametrize("multiple", [0, -8, 1025, 10**30])
def test_a_rank_multiple_is_positive_and_bounded(tmp_path: Path, multiple: int) -> None:
    with pytest.raises(ConfigError, match=f"The rank multiple is {multiple}; expected a whole number of at least 1"):
        export_uniform(adapter(tmp_path / "many"), tmp_path / "one", rank_multiple=multiple)


@pytest.mark.parametrize(("module", "name"), [(export, "save_file"), (os, "fsync"), (os, "replace")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, error: BaseException
) -> None:
    source = adapter(tmp_path / "many")

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(WriteError if isinstance(error, OSError) else KeyboardInterrupt):
        export_uniform(source, tmp_path / "one")
    assert os.listdir(tmp_path) == ["many"]


def test_patterns_are_matched_as_peft_matches_them() -> None:
    patterns = ["q", r"h\.1\.q", r"^h\.1\..*", r"(?<=^h\.1\.).*", "h.1", "1.q", r".*\.q", "k|q", "qq"]
    for first in patterns:
        for second in patterns:
            pattern = dict.fromkeys([first, second], 0) | {first: 1}
            for name in ("h.1.q", "h.11.q", "h.1.qq", "a.h.1.q", "q", "k.h"):
                assert export._matching(pattern, name, 8) == pattern.get(get_pattern_key(pattern, name), 8)
