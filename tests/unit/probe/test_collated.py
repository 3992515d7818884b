"""Rows that go through a collator: which do, what is read of them, and what is kept of their batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers.trainer_utils import RemoveColumnsCollator

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ProbeError
from gelora_plugins.probe.collated import compact, expand, fingerprint
from gelora_plugins.probe.documents import ROWS_PER_DOCUMENT, choose_documents

DECODER = SimpleNamespace(is_encoder_decoder=False, pad_token_id=9)
SEQ2SEQ = SimpleNamespace(is_encoder_decoder=True, pad_token_id=9)


def choose(dataset, collator=None, model_config=DECODER, accepted=(), **options):
    return choose_documents(dataset, GeLoRAConfig(**options), model_config, collator, accepted)


def seen_by(rows, **options):
    """Whether the rows go through the collator that they are given."""

    def collate(some):
        return {"seen": torch.ones(len(some))}

    (batch,) = choose(rows, collate, **options).batches(16)
    return "seen" in batch


# Which rows go through the collator


@pytest.mark.parametrize("value", [["a.png"], None, [[0.5]]])
@pytest.mark.parametrize("column", ["images", "bbox", "mm_token_type_ids", "notes"])
def test_a_column_that_may_matter_sends_rows_through_the_collator(column, value):
    assert seen_by([{"input_ids": [5, 6], "labels": [5, 6], column: value}])


@pytest.mark.parametrize(
    "column", ["attention_mask", "labels", "label", "length", "completion_mask", "special_tokens_mask", "seq_lengths"]
)
def test_columns_that_do_not_matter_leave_rows_of_tokens_alone(column):
    assert not seen_by([{"input_ids": [5, 6], column: [1, 1]}])


def test_a_column_that_the_trainer_removes_does_not_matter_and_one_that_it_keeps_does():
    def collate(some):
        return {"seen": torch.ones(len(some))}

    rows = [{"input_ids": [5, 6], "text": "a b", "bbox": [[0, 0, 1, 1]] * 2}]
    for kept, names in ((["input_ids", "bbox"], {"seen"}), (["input_ids"], {"input_ids", "attention_mask"})):
        (batch,) = choose(rows, RemoveColumnsCollator(collate, kept)).batches(16)
        assert set(batch) == names


def test_without_a_collator_what_the_model_reads_is_never_dropped():
    rows = [{"input_ids": [5, 6], "bbox": [[0, 0, 1, 1]] * 2, "text": "a"}]
    assert choose(rows).num_documents == 1
    with pytest.raises(
        ProbeError, match=r"^A row is the fields input_ids, bbox, text; expected token ids alone \(bbox\)"
    ):
        choose(rows, accepted=["input_ids", "bbox"])
    with pytest.raises(ProbeError, match=r"alone \(images\)\. Pass the collator"):
        choose([{"input_ids": [5], "images": None}, {"input_ids": [6], "images": ["a.png"]}])


@pytest.mark.parametrize("later", [{"input_ids": [6], "bbox": [[0] * 4]}, {"pixel_values": [0.5]}, {"text": "a"}])
def test_a_later_row_that_is_of_another_kind_is_an_error(later):
    with pytest.raises(ProbeError, match="expected token ids alone"):
        choose([{"input_ids": [5]}, later], lambda some: {"seen": torch.ones(len(some))}, probe_seed=1)


# How much is read


class Counted(IterableDataset):
    def __init__(self, row):
        self.row, self.count = row, 0

    def __iter__(self):
        while True:
            self.count += 1
            yield self.row(self.count)


def test_no_more_of_a_stream_is_read_than_is_needed():
    pictures = Counted(lambda i: {"pixel_values": torch.full((1, 2), float(i))})
    assert choose(pictures, torch.utils.data.default_collate, probe_samples=7).num_documents == 7
    texts = Counted(lambda i: {"input_ids": [i // 2, 5]})  # each twice, but for the first
    assert choose(texts, probe_samples=7).num_documents == 7
    repeats = Counted(lambda i: {"input_ids": [5]})
    assert choose(repeats, probe_samples=7).num_documents == 1
    assert (pictures.count, texts.count, repeats.count) == (7, 12, 7 * ROWS_PER_DOCUMENT)


class ReturnsItsIterator(IterableDataset):
    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


class IsItsIterator(ReturnsItsIterator):
    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


@pytest.mark.parametrize("kind", [ReturnsItsIterator, IsItsIterator])
def test_a_dataset_that_can_be_read_once_is_refused_and_left_whole(kind):
    stream = kind([{"input_ids": [5, i]} for i in range(9)])
    with pytest.raises(
        ProbeError, match=rf"^The training dataset can be read once: each iter\(\) of the {kind.__name__}"
    ):
        choose(stream)
    assert [row["input_ids"][1] for row in stream] == list(range(9))


# What is kept in memory, and its fingerprint


@pytest.mark.parametrize(
    "value",
    [
        [0.5, 0.1, float("inf"), 1e300],
        [0.5, -2.0],
        [[1, 2], [3, 4]],
        [[1, 2], [3]],
        [True, False],
        [2**70, 1],
        [2**63, 1],
        [[], []],
        [["a"], ["b"]],
        [1, 0.5],
        [0.5, None],
        ["a", "b"],
        [],
        [{"role": "user", "content": "hello"}],
        "text",
        0.25,
    ],
)
def test_a_row_is_given_to_the_collator_as_it_was(value):
    row = {"a": value, "b": {"c": value}}
    again = expand(compact(row))
    assert again == row
    assert str(again) == str(row)
    assert expand(compact(value)) == value


def test_lists_of_floats_are_kept_and_read_as_arrays():
    values = np.random.default_rng(0).standard_normal(1000).astype("float32")
    kept = compact({"input_values": values.tolist(), "labels": 1})
    assert kept["input_values"].array.nbytes == values.nbytes
    other = compact({"input_values": [*values[:-1].tolist(), 0.0], "labels": 1})
    assert fingerprint([kept]) == fingerprint([compact(expand(kept))]) != fingerprint([other])
    assert fingerprint([compact([[1.0, 2.0]])]) != fingerprint([compact([[1.0], [2.0]])])


# What is kept of a batch


def collated(batch, model_config=DECODER, accepted=(), **options):
    (found,) = choose([{"row": 0}], lambda some: batch, model_config, accepted, **options).batches(16)
    return {name: value.tolist() for name, value in found.items()}


def test_text_of_a_collator_is_cut_as_rows_of_tokens_are():
    batch = {
        "input_ids": torch.tensor([[9, 9, 5, 6, 7], [1, 2, 3, 4, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]),
        "bbox": torch.arange(40).reshape(2, 5, 4),
        "labels": torch.tensor([0, 1]),
    }
    found = collated(batch, probe_max_length=4)
    assert found["input_ids"] == [[5, 6, 7, 9], [1, 2, 3, 4]]
    assert found["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert found["token_type_ids"] == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert found["bbox"][0][0] == [8, 9, 10, 11]
    assert found["labels"] == [0, 1]
    assert collated(batch, probe_max_length=5) == {name: value.tolist() for name, value in batch.items()}


def test_both_texts_of_an_encoder_decoder_are_cut():
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[4, 5, 6, 7]])}
    batch["decoder_input_ids"] = torch.tensor([[0, 4, 5, 6]])
    assert collated(batch, SEQ2SEQ, probe_max_length=2) == {
        "input_ids": [[1, 2]],
        "labels": [[4, 5]],
        "decoder_input_ids": [[0, 4]],
    }


@pytest.mark.parametrize("name", ["pixel_values", "image_grid_thw"])
def test_text_with_a_picture_is_not_cut(name):
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), name: torch.ones(1, 3 if name == "pixel_values" else 2)}
    assert collated(batch, probe_max_length=2)["input_ids"] == [[1, 2, 3]]


def test_the_preferred_half_of_a_batch_of_pairs_is_measured():
    batch = {
        "chosen_input_ids": torch.tensor([[1, 2, 3]]),
        "chosen_attention_mask": torch.tensor([[1, 1, 0]]),
        "chosen_labels": torch.tensor([[-100, 2, -100]]),
        "rejected_input_ids": torch.tensor([[4, 5]]),
        "prompt_input_ids": torch.tensor([[1]]),
    }
    found = collated(batch)
    assert found == {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 0]], "labels": [[-100, 2, -100]]}
    assert collated({**batch, "input_ids": torch.tensor([[7]])})["input_ids"] == [[7]]


def test_arrays_of_a_collator_are_read_and_other_inputs_of_the_model_are_not_dropped():
    assert collated({"input_ids": np.array([[1, 2]])}) == {"input_ids": [[1, 2]]}
    patches = {"input_ids": torch.tensor([[1]]), "image_patches": [torch.ones(1, 2)], "names": ["a"]}
    assert set(collated(patches)) == {"input_ids"}
    with pytest.raises(ProbeError, match="made a list for image_patches, which the model reads; expected a tensor"):
        collated(patches, accepted=["input_ids", "image_patches"])
