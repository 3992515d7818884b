"""Which models GeLoRA reads: the table that tests/integration/models/test_families.py runs cell by cell.

`models_read()` is the same for the README.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig

from tests.support.rows import (
    ANSWERS,
    CHOICES,
    CONTINUED,
    LABELLED,
    PAIRS,
    PLAN_BEFORE,
    Rows,
    continued,
    ids,
    image,
    padded_waves,
    rows,
    spectrogram,
    wave,
)
from tests.support.tiny import VOCABULARY, build

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZES, **IDS, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
TWO = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "init_std": 0.3,
    "decoder_start_token_id": 1,
    **IDS,
}
LONG_TWO = {**TWO, "max_position_embeddings": 64}
WHISPER = {**TWO, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 40}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
TOWERS = {"text_config": {**TEXT, "num_hidden_layers": 2}, "vision_config": VISION}
WAVES = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "mask_time_prob": 0.0,
    "feat_extract_norm": "layer",  # the other norm is over time, padding too
}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_heads": 2,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "decoder_start_token_id": 0,
    **IDS,
}
SPEECH = {"conv_channels": 8, "input_feat_per_channel": 8, "num_conv_layers": 2, "conv_kernel_sizes": (5, 5)}
GEMMA3N = {
    **GROUPED,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 4,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "sliding_window": 8,
    "layer_types": ["full_attention"] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "intermediate_size": [24] * 4,
}
MLLAMA = {
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    },
    "text_config": {**GROUPED, "num_hidden_layers": 4, "cross_attention_layers": [1]},
}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 3, "pad_token_id": 0}


def of(kind: str, config: str, **options: Any) -> Callable[[], Any]:
    """A model with random weights: its class and that of its configuration, in transformers."""

    def make() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(tf, kind)(getattr(tf, config)(**options)).train()

    return make


def image_to_text() -> Any:
    decoder = {name: value for name, value in TWO.items() if name.startswith("decoder")}
    trocr = tf.TrOCRConfig(**{**IDS, **decoder, "d_model": 16})
    model = tf.VisionEncoderDecoderModel(
        encoder=tf.ViTModel(tf.ViTConfig(**VISION)), decoder=tf.TrOCRForCausalLM(trocr)
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model.train()


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        model: makes one.
        rows: makes what it is trained on.
        stacks: how many blocks each of its stacks has; () where it is refused.
        collator: makes a batch of rows; None is that of the Trainer.
        refused: words of the error.
        note: for the README: how it differs from the plain case, or the way out.
        lora: options of the LoRA configuration.
    """

    model: Callable[[], Any]
    rows: Callable[[], Rows]
    stacks: tuple[int, ...] = ()
    collator: Callable[[Rows], Any] | None = None
    refused: str = ""
    note: str = ""
    lora: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})


KEEP = 'train with ranks of your own: `on_failure="keep"`'
ONE_VECTOR = "one vector for each token"
NO_LIST = "were not found: expected one list"
FAMILIES: dict[str, Family] = {
    # decoders
    "Llama, Mistral, Qwen, Gemma, Phi, OPT": Family(lambda: build("llama"), CONTINUED, (3,)),
    "GPT-2": Family(lambda: build("gpt2"), CONTINUED, (3,)),
    "Mamba": Family(
        of("MambaForCausalLM", "MambaConfig", **MAMBA),
        CONTINUED,
        (3,),
        note="PEFT takes no `out_proj` there: name other target modules, or `exclude_modules`",
        lora={"target_modules": "all-linear", "exclude_modules": ["out_proj"]},
    ),
    "Gemma 3n": Family(
        of("Gemma3nForCausalLM", "Gemma3nTextConfig", **GEMMA3N), CONTINUED, refused=ONE_VECTOR, note=KEEP
    ),
    "Mllama, rows without images": Family(
        of("MllamaForConditionalGeneration", "MllamaConfig", **MLLAMA),
        CONTINUED,
        refused="not passed in the forward pass.* images",
        note="rows with images, or a layout plugin that leaves the cross-attention blocks out",
    ),
    # encoders
    "BERT, RoBERTa, DeBERTa, DistilBERT, ModernBERT, classifiers": Family(lambda: build("bert"), LABELLED, (3,)),
    "BERT, question answering": Family(of("BertForQuestionAnswering", "BertConfig", **TEXT), ANSWERS, (3,)),
    "BERT, multiple choice": Family(
        of("BertForMultipleChoice", "BertConfig", **TEXT), CHOICES, refused="a row for each sequence", note=PLAN_BEFORE
    ),
    "Longformer": Family(
        of("LongformerForSequenceClassification", "LongformerConfig", **TEXT, attention_window=16), LABELLED, (3,)
    ),
    "XLNet": Family(
        of("XLNetForSequenceClassification", "XLNetConfig", d_model=16, n_layer=3, n_head=2, d_inner=24, **IDS),
        LABELLED,
        refused=ONE_VECTOR,
        note=KEEP,
    ),
    "ALBERT": Family(lambda: build("albert"), LABELLED, refused=NO_LIST, note=KEEP),
    # encoder-decoders
    "T5": Family(lambda: build("t5"), PAIRS, (3, 2)),
    "BART": Family(lambda: build("bart"), PAIRS, (3, 2)),
    "BART, classifier": Family(of("BartForSequenceClassification", "BartConfig", **LONG_TWO), LABELLED, (3, 2)),
    "T5, classifier": Family(of("T5ForSequenceClassification", "T5Config", **T5), LABELLED, (3, 2)),
    "NLLB, M2M100": Family(of("M2M100ForConditionalGeneration", "M2M100Config", **LONG_TWO), PAIRS, (3, 2)),
    "Blenderbot": Family(of("BlenderbotForConditionalGeneration", "BlenderbotConfig", **LONG_TWO), PAIRS, (3, 2)),
    "T5Gemma": Family(
        of(
            "T5GemmaForConditionalGeneration",
            "T5GemmaConfig",
            encoder=GROUPED,
            decoder={**GROUPED, "num_hidden_layers": 2},
        ),
        PAIRS,
        (3, 2),
    ),
    "ProphetNet": Family(
        of(
            "ProphetNetForConditionalGeneration",
            "ProphetNetConfig",
            hidden_size=16,
            num_encoder_layers=3,
            num_decoder_layers=2,
            num_encoder_attention_heads=2,
            num_decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            **IDS,
        ),
        PAIRS,
        refused=ONE_VECTOR,
        note=KEEP,
    ),
    # speech
    "Whisper": Family(of("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), spectrogram(8, 60), (3, 2)),
    "Whisper, audio classifier": Family(
        of("WhisperForAudioClassification", "WhisperConfig", **WHISPER), spectrogram(8, 60, labels=0), (3,)
    ),
    "Speech2Text": Family(
        of("Speech2TextForConditionalGeneration", "Speech2TextConfig", **TWO, **SPEECH),
        spectrogram(60, 8, attention_mask=[1] * 60),
        (3, 2),
    ),
    "Moonshine": Family(
        of(
            "MoonshineForConditionalGeneration",
            "MoonshineConfig",
            hidden_size=16,
            intermediate_size=24,
            encoder_num_hidden_layers=3,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=2,
            decoder_num_attention_heads=2,
            encoder_num_key_value_heads=2,
            decoder_num_key_value_heads=2,
            decoder_start_token_id=1,
            **IDS,
        ),
        rows(lambda rng, i: {"input_values": torch.randn(1600), "labels": torch.tensor(ids(5, rng))}),
        (3, 2),
    ),
    "wav2vec 2.0, CTC": Family(
        of("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES), wave(lambda rng: ids(3, rng)), (3,), padded_waves
    ),
    "HuBERT, classifier": Family(
        of("HubertForSequenceClassification", "HubertConfig", **WAVES), wave(lambda rng: 0), (3,), padded_waves
    ),
    "WavLM, CTC": Family(of("WavLMForCTC", "WavLMConfig", **WAVES), wave(lambda rng: ids(3, rng)), (3,), padded_waves),
    # images
    "ViT, image classifier": Family(lambda: build("vit"), image(8), (3,)),
    "CLIP, image classifier": Family(of("CLIPForImageClassification", "CLIPConfig", **TOWERS), image(8), (3,)),
    "SigLIP, image classifier": Family(of("SiglipForImageClassification", "SiglipConfig", **TOWERS), image(8), (3,)),
    "ViT with a TrOCR decoder": Family(
        image_to_text,
        rows(lambda rng, i: {"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(ids(5, rng))}),
        (3, 2),
    ),
    "LLaVA, images and text": Family(
        of(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            vision_config={**VISION, "model_type": "clip_vision_model"},
            text_config={**GROUPED, "model_type": "llama", "num_hidden_layers": 2},
            image_token_index=3,
        ),
        rows(lambda rng, i: {"pixel_values": torch.randn(3, 8, 8), **continued(rng, i, [3] * 4)}),
        (2,),
        note="the language model's blocks; modules elsewhere keep your r, and are counted in the log",
    ),
    "Swin": Family(
        of(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=2,
        ),
        image(16),
        refused=ONE_VECTOR,
        note=KEEP,
    ),
}


def lora(family: Family) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, **family.lora)


def models_read() -> str:
    """The table of models for the README."""
    lines = ["| model | measured | |", "| --- | --- | --- |"]
    for name, family in FAMILIES.items():
        sides = ("encoder and decoder" if len(family.stacks) == 2 else "yes") if family.stacks else "refused"
        lines.append(f"| {name} | {sides} | {family.note} |")
    return "\n".join(lines)
