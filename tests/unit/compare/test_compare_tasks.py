"""Tasks of a comparison: what rows may hold, what counts in the loss, how answers are scored."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.metrics import SCORES
from gelora_plugins.compare.scoring import constant_loss, evaluate
from gelora_plugins.compare.task import IGNORED_LABEL, Collator, Task, encode, split_fifth
from gelora_plugins.errors import ConfigError, ProbeError

ROWS = [{"text": f"a {i}", "label": "yes" if i % 2 else "no"} for i in range(20)]


class Letters:
    """One token per letter."""

    eos_token_id = 2

    def __call__(self, first: str, second: str = "", max_length: int = 99, **options: Any) -> dict[str, Any]:
        ids = [ord(letter) for letter in first + second]
        return {"input_ids": ids[:max_length] if options.get("truncation") else ids}


def test_labels_are_numbered_in_their_order() -> None:
    task = Task("t", "classification", ROWS, ROWS[:4])
    assert task.labels == ("no", "yes")
    assert [row["labels"] for row in encode(task, ROWS[:3], Letters())] == [0, 1, 0]


def test_only_the_completion_counts() -> None:
    rows = [{"prompt": "ab", "completion": "cde"}] * 12
    task = Task("t", "causal-lm", rows, rows)
    row = encode(task, rows, Letters())[0]
    assert row["input_ids"] == [97, 98, 99, 100, 101, 2]
    assert row["labels"] == [IGNORED_LABEL, IGNORED_LABEL, 99, 100, 101, 2]
    short = Task("t", "causal-lm", rows, rows, max_length=4)
    assert encode(short, rows, Letters())[0]["labels"] == [IGNORED_LABEL, IGNORED_LABEL, 99, 100]


def prompts(cut: int, whole: int) -> list[dict[str, str]]:
    """Rows whose prompt alone has 8 tokens, and rows of 5 tokens."""
    return [{"prompt": "abcdefgh", "completion": "x"}] * cut + [{"prompt": "ab", "completion": "cd"}] * whole


def test_rows_whose_answer_is_cut_off_are_left_out_and_counted() -> None:
    """They would be steps that train on nothing, and differ by seed and batch size."""
    rows = prompts(2, 18)
    task = Task("t", "causal-lm", rows, rows[1:], max_length=8)
    kept = encode(task, rows, Letters())
    assert [row["input_ids"] for row in kept] == [[97, 98, 99, 100, 2]] * 18
    bench = Bench("", task, Settings(), Path())
    bench.__dict__["tokenizer"] = Letters()
    assert (len(bench.train), len(bench.test)) == (18, 18)
    assert bench.notes == [
        "2 of 20 training rows are left out: max_length, which is 8, cuts off their whole answer.",
        "1 of 19 test rows are left out: max_length, which is 8, cuts off their whole answer.",
    ]


def test_an_answer_of_which_a_token_is_left_is_trained_on() -> None:
    rows = prompts(12, 0)
    assert len(encode(Task("t", "causal-lm", rows, rows, max_length=9), rows, Letters())) == 12


def test_a_text_of_one_token_trains_on_nothing() -> None:
    """The first token follows nothing."""
    rows = [{"text": "a"}, *[{"text": "abc"}] * 11]
    assert len(encode(Task("t", "causal-lm", rows, rows), rows, Letters())) == 11


def test_a_task_of_which_many_rows_are_cut_is_refused() -> None:
    rows = prompts(3, 17)
    task = Task("t", "causal-lm", rows, rows, max_length=8)
    with pytest.raises(ProbeError, match=r"max_length is 8, and cuts off all that counts in 3 of 20 rows.*Give a"):
        encode(task, rows, Letters())


def test_fewer_rows_than_a_seed_is_to_draw_are_refused() -> None:
    rows = prompts(2, 18)
    bench = Bench("", Task("t", "causal-lm", rows, rows, max_length=8), Settings(rows_per_seed=19), Path())
    bench.__dict__["tokenizer"] = Letters()
    with pytest.raises(ProbeError, match="rows_per_seed is 19; 18 training rows have an answer within max_length, whi"):
        bench.drawn(0)


def test_tokens_that_are_given_are_cut_too() -> None:
    rows = [{"input_ids": list(range(20)), "token_type_ids": [0] * 20, "label": i % 2} for i in range(12)]
    row = encode(Task("t", "classification", rows, rows, max_length=5), rows, None)[0]
    assert row == {"input_ids": [0, 1, 2, 3, 4], "token_type_ids": [0] * 5, "labels": 0}


def test_a_fifth_is_held_out_and_nothing_is_lost() -> None:
    kept, fifth = split_fifth(list(range(23)))
    assert len(fifth) == 4
    assert sorted(kept + fifth) == list(range(23))
    assert split_fifth(list(range(23))) == (kept, fifth)


def test_the_five_fifths_hold_every_row_once() -> None:
    for count in (10, 23, 24):
        parts = [split_fifth(list(range(count)), which) for which in range(5)]
        assert sorted(row for _, fifth in parts for row in fifth) == list(range(count))
        assert all(sorted(kept + fifth) == list(range(count)) for kept, fifth in parts)
        assert max(len(fifth) for _, fifth in parts) - min(len(fifth) for _, fifth in parts) <= 1


MISTAKES = {
    "length": ({"max_length": 0}, "max_length is 0; expected at least 1 token"),
    "kind": ({"kind": "ranking"}, "The kind of task is 'ranking'; expected one of: classification, regression, causal"),
    "metric": ({"metric": "bleu"}, "The metric is 'bleu'; expected one of: accuracy, mcc, f1, loss for classification"),
    "too few": ({"train": ROWS[:3]}, "3 training rows and 4 test rows; expected 10 and 1"),
    "labels": (
        {"train": [{"label": i} for i in range(12)], "test": [{"label": 1}], "metric": "mcc"},
        "two labels; the",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_task_that_cannot_be_is_refused(mistake: str) -> None:
    changes, words = MISTAKES[mistake]
    with pytest.raises((ConfigError, ProbeError), match=words):
        Task(**{"name": "t", "kind": "classification", "train": ROWS, "test": ROWS[:4], **changes})


def test_a_row_without_text_or_label_is_named() -> None:
    task = Task("t", "classification", ROWS, ROWS[:4])
    with pytest.raises(ProbeError, match="A row has the fields words; expected text, text_a and text_b, prompt and"):
        encode(task, [{"words": "a"}], Letters())
    with pytest.raises(ProbeError, match="A row has the fields text; expected a label for classification"):
        encode(task, [{"text": "a"}], Letters())


def test_scores_are_what_they_are_by_hand() -> None:
    answers, labels = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 0, 1, 1])  # tp 2, fp 1, fn 1, tn 2
    assert SCORES["accuracy"](answers, labels) == pytest.approx(4 / 6)
    assert SCORES["f1"](answers, labels) == pytest.approx(4 / 6)
    assert SCORES["mcc"](answers, labels) == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert SCORES["mcc"](np.ones(6), labels) == 0.0, "one answer to everything"
    assert SCORES["mcc"](answers, np.zeros(6)) == 0.0, "one label on everything"
    assert SCORES["f1"](answers, np.ones(6, int)) == pytest.approx(2 * 3 / (3 + 6))
    assert SCORES["f1"](np.zeros(6, int), np.zeros(6, int)) == 0.0, "neither answers nor labels of 1"
    assert SCORES["spearman"](np.array([0.1, 5.0, 7.0]), np.array([1.0, 2.0, 9.0])) == pytest.approx(1.0)


def test_f1_of_three_labels_is_no_number() -> None:
    """A `Task` refuses it before; a score of one of the labels would be silently wrong."""
    with pytest.raises(ValueError, match="multiclass"):
        SCORES["f1"](np.array([0, 1, 2]), np.array([0, 1, 2]))


def test_padding_and_prompts_are_not_in_the_loss() -> None:
    """The loss over two rows of other lengths is the mean over all tokens that count."""
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [IGNORED_LABEL, IGNORED_LABEL, 3, 4]},
        {"input_ids": [1, 3], "labels": [IGNORED_LABEL, 3]},
    ]
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))  # what follows each token

    class Bigrams(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(logits)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(logits=self.table[input_ids])

    score, loss, parts = evaluate(Bigrams(), rows, Collator("causal-lm", 0), "loss", batch_size=2)
    pairs = [(2, 3), (3, 4), (1, 3)]
    expected = -sum(logits.log_softmax(-1)[before, after].item() for before, after in pairs) / 3
    assert score == loss == pytest.approx(expected, rel=1e-5)
    by_pair = [-2 / 3 * logits.log_softmax(-1)[before, after].item() for before, after in pairs]
    assert parts == pytest.approx([by_pair[0] + by_pair[1], by_pair[2]], rel=1e-5), "in the order of the rows"


def test_the_constant_answer_is_that_of_the_training_rows() -> None:
    train = [{"labels": 0}] * 6 + [{"labels": 1}] * 2
    assert constant_loss("classification", train, [{"labels": 0}, {"labels": 1}]) == pytest.approx(
        -(np.log(0.75) + np.log(0.25)) / 2
    )
    unknown = constant_loss("classification", train, [{"labels": 2}])
    assert unknown == pytest.approx(-np.log(1 / 8)), "as if it had been seen once"
    pairs = [{"labels": [0.0, 2.0]}, {"labels": [2.0, 4.0]}]
    assert constant_loss("regression", pairs, [{"labels": [1.0, 4.0]}]) == pytest.approx(0.5)
    assert constant_loss("regression", [{"labels": 1.0}, {"labels": 3.0}], [{"labels": 5.0}]) == pytest.approx(9.0)
