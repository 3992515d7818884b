"""Models, batches and poolings that give no points are refused."""

import pytest
import torch
from torch import nn

from gelora_plugins.errors import LayoutError, ProbeError
from gelora_plugins.layout import Block, ModelLayout
from gelora_plugins.probe import pooling
from gelora_plugins.probe.find_blocks import find_transformers_layout
from tests.support import probing
from tests.support.probing import features_of_rows, is_seq2seq, random_rows
from tests.support.tiny import VOCABULARY, build


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_an_error_that_names_the_boundary(value):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(value)
    with pytest.raises(ProbeError, match=r"boundary 2 is not finite for 3 of 3 documents"):
        features_of_rows(model, random_rows())


class Tag(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class HalfTheTokens(nn.Module):
    def forward(self, hidden_states):
        return hidden_states[:, ::2]


class NoTensor(nn.Module):
    def forward(self, hidden_states):
        return {"hidden_states": hidden_states}


class Chain(nn.Module):
    """A model that is not of transformers, with its layout; `order` says which block is called when."""

    def __init__(self, *blocks, order=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.blocks = nn.ModuleList(blocks)
        self.order = order or range(len(blocks))
        self.layout = ModelLayout("chain", "", (tuple(Block(f"blocks.{i}", ()) for i in range(len(blocks))),))

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        for i in self.order:
            hidden = self.blocks[i](hidden_states=hidden)
        return hidden


def probe(chain, batch=None, pool=pooling.mean):
    return probing.features_of(chain, chain.layout, [batch or {"input_ids": torch.tensor([[5, 6, 7, 8]])}], pool)


def test_a_model_that_is_not_of_transformers_is_measured_with_its_layout():
    chain = Chain(Tag(), Tag())
    points = probe(chain).points
    assert len(points) == 3
    assert torch.allclose(points[2], chain.embedding(torch.tensor([5, 6, 7, 8])).mean(dim=0, keepdim=True))


def test_a_hidden_state_with_fewer_tokens_is_an_error():
    with pytest.raises(ProbeError, match=r"boundary 2 is \(1, 2, 4\); expected .* tokens \(1, 4\)"):
        probe(Chain(Tag(), HalfTheTokens()))


def test_a_block_that_gives_no_tensor_is_an_error():
    with pytest.raises(ProbeError, match="boundary 1 is dict; expected"):
        probe(Chain(NoTensor()))


def test_a_block_that_is_shared_between_layers_is_an_error():
    with pytest.raises(LayoutError, match=r"Boundary 2 was passed twice.*find_model_layout\(model\)"):
        probe(Chain(Tag(), Tag(), order=[0, 1, 1]))


def test_a_block_that_is_not_called_is_an_error():
    with pytest.raises(LayoutError, match=r"Boundaries \[2\] were not passed.*find_model_layout\(model\)"):
        probe(Chain(Tag(), Tag(), order=[0]))


def test_a_document_without_tokens_is_an_error():
    batch = {"input_ids": torch.tensor([[5, 6], [0, 0]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    with pytest.raises(ProbeError, match="has no tokens"):
        probe(Chain(Tag()), batch)


@pytest.mark.parametrize("names", [["labels"], ["labels", "pixel_values"]])
def test_a_batch_without_inputs_of_the_model_is_an_error(names):
    with pytest.raises(
        ProbeError, match=f"A batch has {', '.join(names)}; expected inputs that Chain takes.*input_ids"
    ):
        probe(Chain(Tag()), {name: torch.tensor([[1]]) for name in names})


@pytest.mark.parametrize("pool", [lambda hidden, mask: hidden, lambda hidden, mask: hidden[0], lambda h, m: h[:, 0, 0]])
def test_a_pooling_that_makes_no_point_per_document_is_an_error(pool):
    with pytest.raises(ProbeError, match=r"The pooling made points of shape .* of 1 documents"):
        probe(Chain(Tag()), pool=pool)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "bart"])
@pytest.mark.parametrize("token", [VOCABULARY, 10**6, -1])
def test_a_token_beyond_the_vocabulary_is_an_error(family, token):
    model = build(family)
    rows = [{"input_ids": [5, token, 6]}, {"input_ids": [5, 6]}]
    if is_seq2seq(model):
        rows = [{**row, "labels": [7, 8]} for row in rows]
    said = rf"^input_ids has the token {token}, and the model's vocabulary the tokens 0 to {VOCABULARY - 1}\."
    with pytest.raises(ProbeError, match=said):
        features_of_rows(model, rows)


def test_a_label_beyond_the_vocabulary_is_an_error_where_a_decoder_reads_it():
    with pytest.raises(ProbeError, match=rf"^decoder_input_ids has the token {VOCABULARY}, "):
        features_of_rows(build("t5"), [{"input_ids": [5, 6], "labels": [VOCABULARY, 7]}])


def test_tokens_that_were_added_to_the_model_are_no_error():
    model = build("llama")
    model.resize_token_embeddings(VOCABULARY + 1)
    assert features_of_rows(model, [{"input_ids": [5, VOCABULARY]}]).num_tokens == 2


def test_an_encoder_decoder_without_labels_is_an_error():
    model = build("t5")
    with pytest.raises(
        ProbeError, match="T5ForConditionalGeneration needs decoder inputs; expected `decoder_input_ids`"
    ):
        probing.features_of(
            model, find_transformers_layout(model), [{"input_ids": torch.tensor([[5, 6]])}], pooling.mean
        )
