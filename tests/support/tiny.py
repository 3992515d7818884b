"""Tiny models with random weights, one of each family: `build("llama")`, `build("bert", bare=True)`."""

from typing import Any

import torch
import transformers

VOCABULARY = 97
BLOCKS = 3
DECODER_BLOCKS = 2  # of an encoder-decoder, so that a mix-up of its stacks shows

_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,  # larger than usual: a token that is missed must show in the hidden states
}
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_SIZES, **_IDS, "max_position_embeddings": 64}
_GROUPED = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": BLOCKS,
    "num_decoder_layers": DECODER_BLOCKS,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 16,
    "encoder_layers": BLOCKS,
    "decoder_layers": DECODER_BLOCKS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
}

_CAUSAL, _CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
_SEQ2SEQ, _IMAGES = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (_CAUSAL, _GROUPED),
    "mistral": (_CAUSAL, _GROUPED),
    "qwen2": (_CAUSAL, _GROUPED),
    "qwen3": (_CAUSAL, _GROUPED),
    "gemma": (_CAUSAL, _GROUPED),
    "gemma2": (_CAUSAL, _GROUPED),
    "gemma3_text": (_CAUSAL, _GROUPED),
    "gpt2": (_CAUSAL, _TEXT),
    "gpt_neox": (_CAUSAL, _TEXT),
    "opt": (_CAUSAL, {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi": (_CAUSAL, _TEXT),
    "bert": (_CLASSIFIER, _TEXT),
    "roberta": (_CLASSIFIER, {**_TEXT, "pad_token_id": 3}),
    "deberta-v2": (_CLASSIFIER, {**_TEXT, **_DEBERTA}),
    "distilbert": (_CLASSIFIER, {**_TEXT, "hidden_dim": 24}),
    "modernbert": (_CLASSIFIER, {**_TEXT, "cls_token_id": 1, "sep_token_id": 2}),
    "t5": (_SEQ2SEQ, {**_IDS, **_T5}),
    "bart": (_SEQ2SEQ, {**_IDS, **_BART}),
    "vit": (_IMAGES, {**_SIZES, "image_size": 8, "patch_size": 4}),
    "albert": (_CLASSIFIER, {**_TEXT, "embedding_size": 16}),  # one block, used by every layer
    "xlm": (_CLASSIFIER, {**_TEXT, "mask_token_id": 4}),  # no blocks: a list of attentions, a list of feed-forwards
}


def build(family: str, *, bare: bool = False, seed: int = 0, **options: Any) -> Any:
    """A model with its task head, or without (`bare`), in training mode; `options` go to its configuration."""
    head, defaults = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **{**defaults, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, "AutoModel" if bare else head).from_config(config).train()
