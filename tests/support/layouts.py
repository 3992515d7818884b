"""The layout of each tiny model of `tests.support.tiny`, written out."""

from gelora_plugins.layout import Block, Linear, ModelLayout
from tests.support.tiny import BLOCKS, DECODER_BLOCKS

LLAMA_BLOCK = [
    ("self_attn.q_proj", 16, 16),
    ("self_attn.k_proj", 16, 8),
    ("self_attn.v_proj", 16, 8),
    ("self_attn.o_proj", 16, 16),
    ("mlp.gate_proj", 16, 24),
    ("mlp.up_proj", 16, 24),
    ("mlp.down_proj", 24, 16),
]
BERT_BLOCK = [
    ("attention.self.query", 16, 16),
    ("attention.self.key", 16, 16),
    ("attention.self.value", 16, 16),
    ("attention.output.dense", 16, 16),
    ("intermediate.dense", 16, 24),
    ("output.dense", 24, 16),
]
DEBERTA_BLOCK = [
    ("attention.self.query_proj", 16, 16),
    ("attention.self.key_proj", 16, 16),
    ("attention.self.value_proj", 16, 16),
    ("attention.self.pos_key_proj", 16, 16),
    ("attention.self.pos_query_proj", 16, 16),
    *BERT_BLOCK[3:],
]


def attention(name: str, *linears: str) -> list[tuple[str, int, int]]:
    return [(f"{name}.{linear}", 16, 16) for linear in linears]


T5_ATTENTION = attention("layer.0.SelfAttention", "q", "k", "v", "o")
BART_ATTENTION = attention("self_attn", "k_proj", "v_proj", "q_proj", "out_proj")
MLP = [("fc1", 16, 24), ("fc2", 24, 16)]

# family: (path of the backbone in the model with a head, [(path of the blocks in the backbone, block), ...])
EXPECTED = {
    "llama": ("model", [("layers", LLAMA_BLOCK)]),
    "mistral": ("model", [("layers", LLAMA_BLOCK)]),
    "qwen2": ("model", [("layers", LLAMA_BLOCK)]),
    "qwen3": ("model", [("layers", LLAMA_BLOCK)]),
    "gemma": ("model", [("layers", LLAMA_BLOCK)]),
    "gemma2": ("model", [("layers", LLAMA_BLOCK)]),
    "gemma3_text": ("model", [("layers", LLAMA_BLOCK)]),
    "gpt2": (
        "transformer",
        [
            (
                "h",
                [("attn.c_attn", 16, 48), ("attn.c_proj", 16, 16), ("mlp.c_fc", 16, 64), ("mlp.c_proj", 64, 16)],
            )
        ],
    ),
    "gpt_neox": (
        "gpt_neox",
        [
            (
                "layers",
                [
                    ("attention.query_key_value", 16, 48),
                    ("attention.dense", 16, 16),
                    ("mlp.dense_h_to_4h", 16, 24),
                    ("mlp.dense_4h_to_h", 24, 16),
                ],
            )
        ],
    ),
    "opt": ("model", [("decoder.layers", BART_ATTENTION + MLP)]),
    "phi": (
        "model",
        [
            (
                "layers",
                [
                    *attention("self_attn", "q_proj", "k_proj", "v_proj", "dense"),
                    ("mlp.fc1", 16, 24),
                    ("mlp.fc2", 24, 16),
                ],
            )
        ],
    ),
    "bert": ("bert", [("encoder.layer", BERT_BLOCK)]),
    "roberta": ("roberta", [("encoder.layer", BERT_BLOCK)]),
    "deberta-v2": ("deberta", [("encoder.layer", DEBERTA_BLOCK)]),
    "distilbert": (
        "distilbert",
        [
            (
                "transformer.layer",
                [
                    *attention("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
                    ("ffn.lin1", 16, 24),
                    ("ffn.lin2", 24, 16),
                ],
            )
        ],
    ),
    "modernbert": (
        "model",
        [("layers", [("attn.Wqkv", 16, 48), ("attn.Wo", 16, 16), ("mlp.Wi", 16, 48), ("mlp.Wo", 24, 16)])],
    ),
    "t5": (
        "",
        [
            (
                "encoder.block",
                [*T5_ATTENTION, ("layer.1.DenseReluDense.wi", 16, 24), ("layer.1.DenseReluDense.wo", 24, 16)],
            ),
            (
                "decoder.block",
                [
                    *T5_ATTENTION,
                    *attention("layer.1.EncDecAttention", "q", "k", "v", "o"),
                    ("layer.2.DenseReluDense.wi", 16, 24),
                    ("layer.2.DenseReluDense.wo", 24, 16),
                ],
            ),
        ],
    ),
    "bart": (
        "model",
        [
            ("encoder.layers", BART_ATTENTION + MLP),
            (
                "decoder.layers",
                [*BART_ATTENTION, *attention("encoder_attn", "k_proj", "v_proj", "q_proj", "out_proj"), *MLP],
            ),
        ],
    ),
    "vit": (
        "vit",
        [
            (
                "layers",
                [
                    *attention("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
                    ("mlp.fc1", 16, 24),
                    ("mlp.fc2", 24, 16),
                ],
            )
        ],
    ),
}

# The norm that some backbones put on their last hidden state, for each stack; the others have none there.
FINAL_NORMS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), ("norm",)),
    "gpt2": ("ln_f",),
    "gpt_neox": ("final_layer_norm",),
    "opt": ("decoder.final_layer_norm",),
    "phi": ("final_layernorm",),
    "modernbert": ("final_norm",),
    "t5": ("encoder.final_layer_norm", "decoder.final_layer_norm"),
}


def expected_layout(family: str, backbone: str) -> ModelLayout:
    stacks = []
    for path, linears in EXPECTED[family][1]:
        path = f"{backbone}.{path}" if backbone else path
        decoder = len(stacks) == 1
        names = [f"{path}.{i}" for i in range(DECODER_BLOCKS if decoder else BLOCKS)]
        stacks.append(tuple(Block(name, tuple(Linear(f"{name}.{x}", i, o) for x, i, o in linears)) for name in names))
    return ModelLayout(family, backbone, tuple(stacks))
