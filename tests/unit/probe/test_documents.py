import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from gelora_plugins.probe import pooling
from gelora_plugins.probe.documents import ROWS_PER_DOCUMENT
from gelora_plugins.probe.find_blocks import find_transformers_layout
from tests.support.choosing import SEQ2SEQ, Rows, Stream, choose
from tests.support.probing import features_of
from tests.support.tiny import build


def documents(probe_set, field="input_ids", mask="attention_mask"):
    """Every document as a list of ids, without padding, in the order of the batches."""
    found = []
    for batch in probe_set.batches(16):
        for ids, kept in zip(batch[field], batch[mask].bool(), strict=True):
            found.append(ids[kept].tolist())
    return found


def numbered_rows(n):
    """Row i is the document [100, i], so that it can be told which rows were chosen."""
    return [{"input_ids": [100, i]} for i in range(n)]


def numbers(probe_set):
    return [document[1] for document in documents(probe_set)]


class StreamThatKnowsItsLength(Stream):
    def __len__(self):
        return len(self.rows)


DATASETS = {
    "list": list,
    "tensors": lambda rows: [{name: torch.tensor(value) for name, value in row.items()} for row in rows],
    "lists of numpy integers": lambda rows: [{name: list(np.array(v)) for name, v in row.items()} for row in rows],
    "datasets.Dataset": datasets.Dataset.from_list,
    "datasets.Dataset as torch": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "datasets.Dataset as numpy": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "torch Dataset": Rows,
}
STREAMS = {
    "datasets.IterableDataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "torch IterableDataset": Stream,
    "torch IterableDataset with a length": StreamThatKnowsItsLength,
    "generator": iter,
}


@pytest.mark.parametrize("kind", DATASETS)
def test_every_map_style_dataset_gives_the_same_documents(kind):
    rows = [{"input_ids": [5, i, 7][: 1 + i % 3], "attention_mask": [1] * (1 + i % 3)} for i in range(40)]
    given, plain = choose(DATASETS[kind](rows), probe_samples=20), choose(rows, probe_samples=20)
    assert documents(given) == documents(plain)
    assert given.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("kind", STREAMS)
def test_every_stream_is_read(kind):
    rows = numbered_rows(30)
    assert sorted(numbers(choose(STREAMS[kind](rows)))) == list(range(30))
    few = numbers(choose(STREAMS[kind](rows), probe_samples=10))
    assert len(few) == 10
    assert few != list(range(10)), "only the beginning of the stream was chosen"
    assert few == numbers(choose(STREAMS[kind](rows), probe_samples=10))
    assert few != numbers(choose(STREAMS[kind](rows), probe_samples=10, probe_seed=1))


def test_an_endless_stream_is_read_to_a_bound():
    read = []

    def forever():
        while True:
            read.append(1)
            yield {"input_ids": [len(read) % 3]}

    assert choose(forever(), probe_samples=5).num_documents == 3
    assert 5 * ROWS_PER_DOCUMENT <= len(read) <= 5 * ROWS_PER_DOCUMENT + 1


def test_one_seed_chooses_the_same_documents_and_another_seed_others():
    rows = numbered_rows(200)
    first, again, other = (choose(rows, probe_samples=50, probe_seed=seed) for seed in (0, 0, 1))
    assert numbers(first) == numbers(again)
    assert first.fingerprint() == again.fingerprint()
    assert set(numbers(first)) != set(numbers(other))
    assert first.fingerprint() != other.fingerprint()


def test_the_sample_is_without_replacement_and_from_everywhere():
    chosen = numbers(choose(numbered_rows(200), probe_samples=50))
    assert len(set(chosen)) == 50
    assert min(chosen) < 50
    assert max(chosen) > 150


def test_all_documents_are_chosen_when_there_are_fewer_than_wanted():
    probe_set = choose(numbered_rows(30), probe_samples=1000)
    assert probe_set.num_documents == 30
    assert sorted(numbers(probe_set)) == list(range(30))


def test_the_choice_does_not_touch_the_global_random_state():
    before = random.getstate(), torch.get_rng_state()
    choose(numbered_rows(20), probe_samples=5)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_repeated_inputs_are_left_out_and_counted():
    probe_set = choose(numbered_rows(20) + numbered_rows(8))
    assert probe_set.num_documents == 20
    assert probe_set.num_repeats == 8
    assert sorted(numbers(probe_set)) == list(range(20))


def test_inputs_that_are_equal_once_padding_is_stripped_are_repeats():
    rows = [
        {"input_ids": [5, 6]},
        {"input_ids": [9, 5, 6], "attention_mask": [0, 1, 1]},
        {"input_ids": [5, 6, 9], "attention_mask": [1, 1, 0]},
        {"input_ids": [9, 5, 6]},
    ]
    probe_set = choose(rows)
    assert (probe_set.num_documents, probe_set.num_repeats) == (2, 2)


def test_more_rows_are_read_where_some_repeat():
    rows = [{"input_ids": [i % 10]} for i in range(1000)]
    assert choose(rows, probe_samples=10).num_documents == 10


def test_the_search_for_distinct_rows_is_bounded():
    class Counting(Rows):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            return self.rows[i]

    dataset = Counting([{"input_ids": [1]}] * 1000)
    assert choose(dataset, probe_samples=3).num_documents == 1
    assert dataset.reads == 3 * ROWS_PER_DOCUMENT


@pytest.mark.parametrize("kind", [list, iter], ids=["list", "stream"])
def test_as_many_documents_as_wanted_are_found_where_only_every_tenth_row_is_new(kind):
    rows = [{"input_ids": [i if i % 10 == 9 else 0]} for i in range(200)]
    assert choose(kind(rows), probe_samples=20).num_documents == 20


def test_long_documents_are_cut():
    rows = [{"input_ids": list(range(length))} for length in (3, 5, 8)]
    assert documents(choose(rows, probe_max_length=5)) == [list(range(5)), list(range(3))]


def test_long_documents_and_labels_of_an_encoder_decoder_are_cut():
    row = {"input_ids": [9, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "labels": [-100, 8, 10, 11]}
    (batch,) = choose([row], SEQ2SEQ, probe_max_length=2).batches(16)
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([[5, 6]], [[8, 10]])


def test_the_length_is_counted_without_padding():
    row = {"input_ids": [9, 9, 9, 5, 6, 7], "attention_mask": [0, 0, 0, 1, 1, 1]}
    assert documents(choose([row], probe_max_length=2)) == [[5, 6]]


def test_packed_rows_are_taken_apart():
    single = [[5, 6, 7], [8], [10, 11, 12, 13], [14, 15]]
    packed = [
        {"input_ids": single[0] + single[1], "seq_lengths": [3, 1]},
        {"input_ids": single[2] + single[3], "seq_lengths": [4, 2]},
    ]
    counted = [
        {"input_ids": single[0] + single[1], "position_ids": [0, 1, 2, 0]},
        {"input_ids": single[2] + single[3], "position_ids": [0, 1, 2, 3, 0, 1]},
    ]
    for dataset in (packed, datasets.Dataset.from_list(packed).with_format("torch"), counted):
        probe_set = choose(dataset)
        assert probe_set.num_documents == 4
        assert sorted(documents(probe_set)) == sorted(documents(choose([{"input_ids": ids} for ids in single])))


def test_positions_of_one_document_do_not_take_it_apart():
    ids = [5, 6, 7, 8]
    for positions in ([0, 1, 2, 3], [2, 3, 4, 5]):
        assert documents(choose([{"input_ids": ids, "position_ids": positions}])) == documents(
            choose([{"input_ids": ids}])
        )


def test_a_repeat_inside_packed_rows_is_counted_and_the_sample_is_not_exceeded():
    rows = [{"input_ids": [5, 5, i, 60 + i], "seq_lengths": [1, 1, 1, 1]} for i in range(10, 20)]
    probe_set = choose(rows, probe_samples=4)
    assert probe_set.num_documents == len(documents(probe_set)) == 4
    assert probe_set.num_repeats == 3  # 5 again in the first row, twice in the second


def test_packed_documents_have_the_points_of_unpacked_ones():
    model = build("llama")
    single = [[5, 6, 7], [8], [10, 11, 12, 13], [14, 15]]
    joined = {"input_ids": [5, 6, 7, 8, 10, 11, 12, 13, 14, 15], "position_ids": [0, 1, 2, 0, 0, 1, 2, 3, 0, 1]}
    packed = [{**joined, "seq_lengths": [3, 1, 4, 2]}]
    layout = find_transformers_layout(model)
    points = [
        features_of(model, layout, choose(rows, model.config).batches(16), pooling.mean).points
        for rows in (packed, [{"input_ids": ids} for ids in single])
    ]
    for ours, theirs in zip(*points, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_batches_are_sorted_by_length_and_padded_on_the_right():
    rng = random.Random(0)
    rows = [{"input_ids": [rng.randrange(10, 90) for _ in range(rng.randrange(1, 20))]} for _ in range(23)]
    batches = list(choose(rows).batches(4))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 4, 4, 3]
    lengths = torch.cat([batch["attention_mask"].sum(dim=1) for batch in batches])
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        mask = batch["attention_mask"].bool()
        assert mask.shape[1] == mask.sum(dim=1).max()
        assert (batch["input_ids"][~mask] == 9).all()
        assert torch.equal(mask.int().sort(dim=1, descending=True).values.bool(), mask)


def test_batches_can_be_made_again():
    probe_set = choose(iter(numbered_rows(10)))
    assert numbers(probe_set) == numbers(probe_set)
    assert len(numbers(probe_set)) == 10


@pytest.mark.parametrize("pad", [None, -1])
def test_padding_is_a_token_that_exists_where_the_model_names_none(pad):
    model_config = SimpleNamespace(is_encoder_decoder=False, pad_token_id=pad)
    (batch,) = choose([{"input_ids": [5, 6]}, {"input_ids": [7]}], model_config).batches(16)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]


def test_token_types_are_kept_where_there_are_any():
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1], "attention_mask": [1, 1, 1]},
        {"input_ids": [9, 5], "token_type_ids": [0, 1], "attention_mask": [0, 1]},
        {"input_ids": [8], "token_type_ids": [0], "attention_mask": [1]},
    ]
    (batch,) = choose(rows).batches(16)
    types = {
        tuple(ids): kinds
        for ids, kinds in zip(batch["input_ids"].tolist(), batch["token_type_ids"].tolist(), strict=True)
    }
    assert types == {(5, 6, 7): [0, 0, 1], (5, 9, 9): [1, 0, 0], (8, 9, 9): [0, 0, 0]}
    (batch,) = choose(rows[2:]).batches(16)
    assert "token_type_ids" not in batch


def test_the_same_tokens_with_other_types_are_another_document():
    rows = [{"input_ids": [5, 6], "token_type_ids": types} for types in ([0, 0], [0, 1])]
    assert choose(rows).num_documents == 2


def test_an_encoder_decoder_gets_labels_and_their_mask():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 8, 10, -100]}, {"input_ids": [5], "labels": [11, 12, 13]}]
    (batch,) = choose(rows, SEQ2SEQ).batches(16)
    assert batch["labels"].tolist() == [[8, 10, -100], [11, 12, 13]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]]


def test_the_labels_of_a_decoder_are_left_out():
    (batch,) = choose([{"input_ids": [5, 6], "labels": [-100, 6]}]).batches(16)
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    "other",
    [
        [{"input_ids": [5, 6]}, {"input_ids": [7, 9]}],
        [{"input_ids": [5, 6]}],
        [{"input_ids": [5]}, {"input_ids": [6, 7, 8]}],
        [{"input_ids": [5, 6], "token_type_ids": [0, 1]}, {"input_ids": [7, 8]}],
    ],
)
def test_the_fingerprint_changes_with_the_data(other):
    rows = [{"input_ids": [5, 6]}, {"input_ids": [7, 8]}]
    assert choose(rows).fingerprint() == choose(rows).fingerprint()
    assert choose(other).fingerprint() != choose(rows).fingerprint()
