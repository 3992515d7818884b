"""Texts of single letters, and the tokenizer that reads them."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import VOCABULARY
from tests.support.training import rows

LETTERS = [chr(code) for code in range(33, 127)][: VOCABULARY - 3]


def tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a token of the tiny models."""
    words = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "</s>": 2, **{c: i + 3 for i, c in enumerate(LETTERS)}}, "?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="</s>", pad_token="?")


def texts() -> list[str]:
    """The rows of `training.rows` as letters."""
    return ["".join(LETTERS[i % len(LETTERS)] for i in row["input_ids"]) for row in rows()]
