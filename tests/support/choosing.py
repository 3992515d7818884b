"""Datasets of every kind, and the documents that are chosen from them."""

from types import SimpleNamespace

from torch.utils.data import Dataset, IterableDataset

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.probe.documents import choose_documents

DECODER = SimpleNamespace(is_encoder_decoder=False, pad_token_id=9)
SEQ2SEQ = SimpleNamespace(is_encoder_decoder=True, pad_token_id=9)


def choose(dataset, model_config=DECODER, collator=None, **options):
    return choose_documents(dataset, GeLoRAConfig(**options), model_config, collator)


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)
