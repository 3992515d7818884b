import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def little_to_look_at() -> None:
    """`Trainer.train` collects garbage; what earlier tests have left is looked at once here, not in each training."""
    gc.collect()
    gc.freeze()
