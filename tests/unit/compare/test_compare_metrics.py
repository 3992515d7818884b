"""Metrics of people who train language models, and metrics of their own."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gelora_plugins.compare.generate import generated
from gelora_plugins.compare.metrics import exact_match
from gelora_plugins.compare.scoring import evaluate
from gelora_plugins.compare.task import Collator, Task, encode
from gelora_plugins.errors import ConfigError, ProbeError
from tests.support.letters import LETTERS, tokenizer
from tests.support.tiny import build

PROMPTS = ["".join(LETTERS[(7 * i + k) % 40] for k in range(2 + i % 4)) for i in range(12)]
PAD = 0


def answered(model: Any, prompt: str, count: int) -> str:
    """What the model says after a prompt, token by token, without any padding."""
    ids = tokenizer()(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == 2:
            break
    return tokenizer().decode(ids[start:], skip_special_tokens=True)


def rows_of(completions: list[str]) -> list[dict[str, str]]:
    return [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, completions, strict=True)]


def scored(model: Any, rows: list[dict[str, str]], metric: str) -> tuple[float, float, list[float]]:
    encoded = encode(Task("t", "causal-lm", rows, rows, metric), rows, tokenizer())
    return evaluate(model, encoded, Collator("causal-lm", PAD), metric, batch_size=5, tokenizer=tokenizer())


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], str]:
    """`named(function)`: the function in a module that can be imported, as a metric is named."""

    def named(function: Callable[..., Any]) -> str:
        module = types.ModuleType("of_the_user")
        vars(module)["score"] = function
        monkeypatch.setitem(sys.modules, "of_the_user", module)
        return "of_the_user:score"

    return named


def test_what_is_generated_is_what_the_model_says_without_padding() -> None:
    """Rows of several lengths in one batch: padding on the left, and the answers in the order of the rows."""
    model = build("llama").eval()
    said = [answered(model, prompt, 4) for prompt in PROMPTS]
    rows = rows_of(["abc"] * 12)  # four tokens with the end: as many are generated
    encoded = encode(Task("t", "causal-lm", rows, rows), rows, tokenizer())
    answers, references = generated(model, encoded, tokenizer(), PAD, 5)
    assert ["".join(answer.split()) for answer in answers] == ["".join(text.split()) for text in said]
    assert ["".join(reference.split()) for reference in references] == ["abc"] * 12


def test_exact_match_counts_the_rows_whose_answer_is_the_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers every prompt with "abc" and its end."""
    model, said = build("llama").eval(), tokenizer()("abc")["input_ids"] + [2, PAD]

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([said] * len(input_ids))], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    rows = rows_of(["abc" if i % 3 else "abd" for i in range(12)])
    score, loss, parts = scored(model, rows, "exact_match")
    assert parts == [float(i % 3 > 0) for i in range(12)]
    assert score == pytest.approx(8 / 12)
    assert loss == pytest.approx(scored(model, rows, "loss")[1], rel=1e-6)
    assert exact_match([" a", "b", "A"], ["a ", "a", "a"]) == [1.0, 0.0, 0.0]


def test_token_accuracy_is_the_share_of_the_tokens_that_count() -> None:
    model = build("llama").eval()
    rows = rows_of([PROMPTS[-1 - i] for i in range(12)])
    right, counted = [], []
    for row in encode(Task("t", "causal-lm", rows, rows), rows, tokenizer()):
        with torch.no_grad():
            likeliest = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        pairs = [(a, b) for a, b in zip(likeliest[:-1], row["labels"][1:], strict=True) if b != -100]
        right.append(sum(a == b for a, b in pairs))
        counted.append(len(pairs))
    score, _, parts = scored(model, rows, "token_accuracy")
    assert score == pytest.approx(sum(right) / sum(counted))
    assert parts == pytest.approx([12 * r / sum(counted) for r in right])


def test_a_metric_of_the_user_gets_texts_and_gives_a_score_a_row(named: Any) -> None:
    seen = []

    def score(answers: list[str], references: list[str]) -> list[float]:
        seen.append(["".join(reference.split()) for reference in references])
        return [i / 10 for i in range(len(answers))]

    found, _, parts = scored(build("llama").eval(), rows_of(["abc"] * 12), named(score))
    assert seen == [["abc"] * 12]
    assert parts == [i / 10 for i in range(12)]
    assert found == pytest.approx(0.55)


def test_a_metric_of_the_user_gets_answers_and_labels_of_a_classification(named: Any) -> None:
    """Its parts are the jackknife's: their mean is the score."""

    class Constant(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return types.SimpleNamespace(logits=torch.tensor([[0.0, 1.0]]).repeat(len(input_ids), 1))

    rows = [{"input_ids": [5] * (1 + i % 3), "labels": int(i % 4 > 0)} for i in range(12)]
    metric = named(lambda answers, labels: float((answers == labels).mean()) ** 2)
    score, _, parts = evaluate(Constant(1, 1), rows, Collator("classification", PAD), metric, batch_size=5)
    assert score == pytest.approx(0.75**2)
    assert sum(parts) / 12 == pytest.approx(score)
    assert len(set(parts)) == 2


@pytest.mark.parametrize("given", [[1.0], 0.5, [float("nan")] * 12, ["a"] * 12, None])
def test_what_is_not_a_number_a_row_is_refused(given: Any, named: Any) -> None:
    metric = named(lambda answers, references: given)
    with pytest.raises(ConfigError, match=r"The metric of_the_user:score gave .*; expected 12 numbers, one a row"):
        scored(build("llama").eval(), rows_of(["abc"] * 12), metric)


MISTAKES = {
    "no module": ("no_such_module:score", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
    "no function": ("math:no_such", "cannot be imported (AttributeError: "),
    "no function but a number": ("math:pi", "The metric 'math:pi' is float; expected a function."),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_metric_that_cannot_be_is_refused_before_anything_is_trained(mistake: str) -> None:
    metric, words = MISTAKES[mistake]
    rows = rows_of(["abc"] * 12)
    with pytest.raises(ConfigError) as error:
        Task("t", "causal-lm", rows, rows, metric)
    assert words in str(error.value)


def test_text_without_a_prompt_has_nothing_to_answer() -> None:
    rows = [{"text": prompt} for prompt in PROMPTS]
    with pytest.raises(ConfigError, match="exact_match is of generated text; it needs test rows with prompt and"):
        Task("t", "causal-lm", rows, rows, "exact_match")


def test_a_completion_that_is_cut_can_match_nothing() -> None:
    rows = rows_of(["abcdefgh"] * 12)
    encoded = encode(Task("t", "causal-lm", rows, rows, max_length=8), rows, tokenizer())
    with pytest.raises(ProbeError, match="max_length cuts the completions of 12 of 12 scored rows, which no generated"):
        generated(build("llama"), encoded, tokenizer(), PAD, 5)


def nothing(answers: list[str], references: list[str]) -> list[float]:
    return [0.0] * len(answers)


def everything(answers: list[str], references: list[str]) -> list[float]:
    return [1.0] * len(answers)


def test_another_function_of_the_same_name_is_another_task(named: Any) -> None:
    rows = rows_of(["abc"] * 12)
    prints = [Task("t", "causal-lm", rows, rows, named(function)).fingerprint for function in (nothing, everything)]
    assert prints[0] != prints[1]
