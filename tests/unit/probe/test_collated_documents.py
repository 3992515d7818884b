"""Documents of rows that go through a collator, images for example."""

import pytest
import torch

from gelora_plugins.errors import ProbeError
from gelora_plugins.probe import pooling
from gelora_plugins.probe.find_blocks import find_transformers_layout
from tests.support.choosing import choose
from tests.support.probing import features_of
from tests.support.tiny import build


def images(n, side=2):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, side, side, generator=generator), "label": i} for i in range(n)]


def stack(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
        "names": ["image"] * len(rows),
    }


def test_rows_without_token_ids_go_through_the_collator():
    probe_set = choose(images(40), collator=stack, probe_samples=10)
    batches = list(probe_set.batches(4))
    assert [set(batch) for batch in batches] == [{"pixel_values", "labels"}] * 3
    chosen = torch.cat([batch["labels"] for batch in batches]).tolist()
    assert len(set(chosen)) == probe_set.num_documents == 10
    assert chosen != list(range(10))


def test_an_image_model_is_measured_through_its_collator():
    model = build("vit")
    batches = choose(images(7, side=8), model.config, collator=stack).batches(3)
    points = features_of(model, find_transformers_layout(model), batches, pooling.mean).points
    assert [len(p) for p in points] == [7] * 4


def test_token_ids_with_an_image_beside_them_go_through_the_collator():
    rows = [{"input_ids": [5, 6], "pixel_values": [[0.5]]}]
    assert choose(rows, collator=lambda rows: {"seen": torch.ones(len(rows))}).num_documents == 1
    with pytest.raises(ProbeError, match="A row is the fields input_ids, pixel_values; expected"):
        choose(rows)


def test_the_fingerprint_of_collated_rows_sees_every_entry_of_a_large_tensor():
    rows, others = images(1, side=40), images(1, side=40)
    others[0]["pixel_values"][1, 20, 20] += 1
    assert choose(rows, collator=stack).fingerprint() == choose(images(1, side=40), collator=stack).fingerprint()
    assert choose(rows, collator=stack).fingerprint() != choose(others, collator=stack).fingerprint()


def test_the_fingerprint_of_images_does_not_hold_their_address():
    class Image:
        """As of Pillow: its repr says where it is in memory."""

        def __init__(self, pixels):
            self.tobytes = lambda: pixels

    rows = [[{"image": Image(pixels)}] for pixels in (b"red", b"red", b"blue")]
    red, again, blue = (choose(r, collator=stack).fingerprint() for r in rows)
    assert red == again != blue
