"""How many rows a data set has, and how many of their tokens have a label: what the rules for the total go by."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import IterableDataset

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.probe.documents import choose_documents

DECODER = SimpleNamespace(is_encoder_decoder=False, pad_token_id=0)
SEQ2SEQ = SimpleNamespace(is_encoder_decoder=True, pad_token_id=0)


def chosen(rows, model_config=DECODER, collator=None, **options):
    return choose_documents(rows, GeLoRAConfig(**options), model_config, collator)


def counted(*rows, **options):
    found = chosen([{**row, "input_ids": [i, *row["input_ids"][1:]]} for i, row in enumerate(rows)], **options)
    return found.num_rows, found.num_targets


IDS = {"input_ids": [5, 6, 7, 8]}


@pytest.mark.parametrize(
    ("row", "targets"),
    [
        (IDS, 4),
        ({**IDS, "attention_mask": [1, 1, 1, 0]}, 3),
        ({**IDS, "labels": [-100, -100, 7, 8]}, 2),
        ({**IDS, "labels": [-100, -100, -100, -100]}, 0),
        ({**IDS, "labels": 1}, 1),
        ({**IDS, "label": 0}, 1),
        ({**IDS, "labels": 0.5}, 1),
        ({**IDS, "labels": [0.0, 1.0, 1.0]}, 3),
        ({**IDS, "labels": torch.tensor([0.5, 0.1])}, 2),
        ({**IDS, "labels": torch.tensor(3)}, 1),
        ({**IDS, "labels": [[1, -100], [2, 3]]}, 3),
        ({**IDS, "label": [1.0, 0.0]}, 2),
        ({**IDS, "label": "sport"}, 1),
        ({**IDS, "labels": None, "label": 2}, 1),
        ({**IDS, "completion_mask": [0, 0, 0, 1]}, 1),
        ({**IDS, "completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1]}, 2),
        ({**IDS, "completion_mask": [0, 1, 1, 1], "attention_mask": [1, 1, 1, 0]}, 2),
    ],
)
def test_the_tokens_of_a_row_that_have_a_label(row, targets):
    assert counted(row, row, row) == (3, 3 * targets)


def test_a_sequence_to_sequence_model_learns_its_labels():
    assert counted({**IDS, "labels": [1, 2, -100]}, model_config=SEQ2SEQ) == (1, 2)


def test_rows_that_were_not_read_are_expected_to_be_like_the_others():
    rows = [{"input_ids": [1, i, 2], "labels": [-100, i, i]} for i in range(500)]
    found = chosen(rows, probe_samples=60)
    assert (found.num_documents, found.num_rows, found.num_targets) == (60, 500, 1000)


def test_repeated_rows_are_trained_on_too():
    assert counted(*[{"input_ids": [1, 2]}] * 3) == (3, 6)
    assert (lambda found: (found.num_documents, found.num_targets))(chosen([{"input_ids": [1, 2]}] * 3)) == (1, 6)


def test_a_row_that_is_longer_than_the_probe_reads_counts_whole():
    assert counted({"input_ids": list(range(100))}, probe_max_length=10) == (1, 100)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": [1, i]} for i in range(80)])


def test_a_stream_has_no_length():
    assert (chosen(Stream()).num_rows, chosen(Stream()).num_targets) == (None, None)


def test_labels_of_no_shape_measure_all_the_same_and_leave_the_rest_unknown():
    """Nobody but the rules for the total reads labels of a decoder."""
    found = chosen([{**IDS, "labels": [[1], [2, 3]]}])
    assert (found.num_documents, found.num_rows, found.num_targets) == (1, 1, None)


def test_rows_for_a_collator_do_not_say_what_is_learnt():
    found = chosen([{"text": str(i)} for i in range(5)], collator=lambda rows: {"input_ids": torch.ones(len(rows), 3)})
    assert (found.num_rows, found.num_targets) == (5, None)
