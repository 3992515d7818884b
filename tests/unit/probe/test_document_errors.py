"""Training data of which no documents can be made are refused."""

import re

import datasets
import pytest
import torch

from gelora_plugins.errors import ProbeError
from tests.support.choosing import SEQ2SEQ, Rows, Stream, choose


@pytest.mark.parametrize("empty", [[], datasets.Dataset.from_list([]), Stream([]), Rows([])])
def test_an_empty_dataset_is_an_error(empty):
    with pytest.raises(ProbeError, match=r"^The training dataset is empty; expected rows to measure on\.$"):
        choose(empty)


def test_no_dataset_is_an_error():
    with pytest.raises(ProbeError, match=r"^There is no training dataset; .* pass `train_dataset`\.$"):
        choose(None)


@pytest.mark.parametrize(
    ("row", "shape"), [({"text": "a", "label": 1}, "the fields text, label"), ("a text", "a str"), ((1, 2), "a tuple")]
)
def test_rows_without_token_ids_and_without_a_collator_are_an_error(row, shape):
    with pytest.raises(ProbeError, match=rf"^A row is {shape}; expected `input_ids`, or a collator"):
        choose([row])


def test_a_collator_that_fails_is_an_error_that_says_on_what():
    def failing(rows):
        raise KeyError("input_ids")

    probe_set = choose([{"text": "a"}], collator=failing)
    with pytest.raises(
        ProbeError, match=r"^The data collator failed on rows with the fields text: KeyError: "
    ) as error:
        list(probe_set.batches(16))
    assert isinstance(error.value.__cause__, KeyError)


def test_a_collator_that_makes_no_batch_is_an_error():
    probe_set = choose([{"prompt": "a"}], collator=list)
    with pytest.raises(
        ProbeError, match=r"^The data collator made a list of rows with the fields prompt; expected a map"
    ):
        list(probe_set.batches(16))


@pytest.mark.parametrize("ids", [[[5, 6]], [0.5], ["a"], [5, None], 7, torch.tensor(7), torch.tensor([[5, 6]])])
def test_token_ids_that_are_no_list_of_integers_are_an_error(ids):
    with pytest.raises(ProbeError, match=f"^input_ids of a row is {re.escape(repr(ids))}; expected a list of whole"):
        choose([{"input_ids": ids}])


def test_an_encoder_decoder_whose_labels_are_all_ignored_is_an_error():
    with pytest.raises(ProbeError, match=r"^A row has the fields input_ids, labels; expected labels with at least one"):
        choose([{"input_ids": [5], "labels": [-100]}], SEQ2SEQ)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("attention_mask", [1, 1], "3 input_ids and 2 of attention_mask; expected one for each token"),
        ("attention_mask", [1, 1, 1, 1], "3 input_ids and 4 of attention_mask"),
        ("token_type_ids", [0, 1], "3 input_ids and 2 of token_type_ids"),
        ("position_ids", [0, 1, 0, 1], "3 input_ids and 4 of position_ids"),
        ("seq_lengths", [2, 2], "3 input_ids and seq_lengths of 4; expected the same"),
        ("seq_lengths", [2], "3 input_ids and seq_lengths of 2; expected the same"),
    ],
)
def test_columns_that_do_not_fit_the_token_ids_are_an_error(column, values, said):
    with pytest.raises(ProbeError, match=said):
        choose([{"input_ids": [1, 2, 3], column: values}])


def test_a_mask_that_does_not_fit_is_an_error_for_an_encoder_decoder():
    with pytest.raises(ProbeError, match="3 input_ids and 2 of attention_mask"):
        choose([{"input_ids": [1, 2, 3], "labels": [1, 2], "attention_mask": [1, 1]}], SEQ2SEQ)


@pytest.mark.parametrize("labels", [{"labels": 1}, {"labels": 0.5}, {"labels": torch.tensor(1)}, {}])
def test_a_class_is_nothing_that_the_decoder_of_an_encoder_decoder_reads(labels):
    (batch,) = choose([{"input_ids": [5, 6], **labels}], SEQ2SEQ).batches(16)
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_row_of_several_sequences_is_refused_with_the_way_out():
    with pytest.raises(ProbeError, match=r"a row for each sequence: plan = select_ranks\(.*GeLoRACallback\(plan="):
        choose([{"input_ids": [[5, 6], [7]]}])
