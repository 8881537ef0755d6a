"""Families from transformers: their own model classes, with small configurations.

Initial weights are scaled so that a layer weighs as much beside what passes it by as in the
originals: 0.02 at a width of 768 is :data:`SCALE` at 64. (The default of some is 1e-10.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from families.family import Family, tokens, values
from torch import Tensor, nn

VOCAB, LENGTH, WIDTH = 131, 13, 64
SCALE = 0.02 * math.sqrt(768 / WIDTH)
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 33, "initializer_range": SCALE}
ENCODER = TEXT | {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": SCALE,
}
STAGES = {"image_size": 32, "patch_size": 2, "initializer_range": SCALE}
TOWER = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "init_std": SCALE} | {
    f"{side}_{what}": size
    for side in ("encoder", "decoder")
    for what, size in (("attention_heads", 4), ("ffn_dim", 96))
}


def built(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    """A function that builds the class ``model`` with a ``config`` of these ``fields``."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**fields)
        return getattr(transformers, model)(made)

    return build


def text(**more: Any) -> Callable[[], dict[str, Tensor]]:
    """Two sentences, the second one padded."""

    def inputs() -> dict[str, Tensor]:
        ids = tokens(2, LENGTH, below=VOCAB)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        return {"input_ids": ids, "attention_mask": mask} | more

    return inputs


def seq2seq() -> dict[str, Tensor]:
    return text(decoder_input_ids=tokens(2, 7, below=VOCAB, seed=1))()


def image() -> dict[str, Tensor]:
    return {"pixel_values": values(2, 3, 32, 32)}


def image_and_text() -> dict[str, Tensor]:
    return text()() | image()


def sam_inputs() -> dict[str, Tensor]:
    points = torch.tensor([[[[5.0, 9.0], [20.0, 3.0]]], [[[1.0, 30.0], [17.0, 16.0]]]])
    return image() | {"input_points": points}


def detr() -> nn.Module:
    from transformers import ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    return built(
        "DetrForObjectDetection",
        "DetrConfig",
        **TOWER,
        backbone_config=backbone,
        num_queries=5,
    )()


def dual(model: str, config: str, **towers: dict[str, Any]) -> Callable[[], nn.Module]:
    """A model of two towers, each with a configuration of its own."""
    return built(model, config, projection_dim=32, **towers)


TEXT_TOWER = ENCODER | {"projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2}
MIXTRAL = ENCODER | {
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
LLAMA = ENCODER | {"num_key_value_heads": 2}
SAM = {
    "initializer_range": SCALE,
    "vision_config": VISION
    | {
        "output_channels": 32,
        "window_size": 2,
        "global_attn_indexes": (1,),
        "mlp_dim": 96,
        "num_pos_feats": 16,
        "scale": 1.0,
    },
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 8},
    "mask_decoder_config": {
        "hidden_size": 32,
        "mlp_dim": 64,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 32,
    },
}
CLAP_AUDIO = {
    "spec_size": 64,
    "num_mel_bins": 16,
    "patch_embeds_hidden_size": 16,
    "hidden_size": WIDTH,
    "depths": (2, 2, 1),
    "num_attention_heads": (2, 4, 4),
    "num_hidden_layers": 3,
    "window_size": 4,
    "projection_dim": 32,
}
VITS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "flow_size": 32,
    "spectrogram_bins": 33,
    "upsample_initial_channel": 32,
    "upsample_rates": (4, 2),
    "upsample_kernel_sizes": (8, 4),
    "resblock_kernel_sizes": (3, 5),
    "resblock_dilation_sizes": ((1, 3), (1, 3)),
    "duration_predictor_filter_channels": 32,
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 2,
    "posterior_encoder_num_wavenet_layers": 2,
    "use_stochastic_duration_prediction": False,
    "noise_scale": 0.0,
}


def vits() -> nn.Module:
    """Every sound about 2.5 frames long, which are rounded up to 3.

    With the initial weights some are nearly whole: any small change makes one longer, and outputs
    of other lengths do not compare.
    """
    model: Any = built("VitsModel", "VitsConfig", **VITS)()
    nn.init.normal_(model.duration_predictor.proj.weight, std=0.01)
    nn.init.constant_(model.duration_predictor.proj.bias, math.log(2.5))
    return model


FAMILIES = [
    Family("BERT", built("BertForMaskedLM", "BertConfig", **ENCODER), text()),
    Family(
        "DistilBERT",
        built(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            **TEXT,
            dim=WIDTH,
            n_layers=2,
            n_heads=4,
            hidden_dim=96,
        ),
        text(),
    ),
    Family("RoBERTa", built("RobertaForMaskedLM", "RobertaConfig", **ENCODER), text()),
    Family(
        "ALBERT",
        built("AlbertForMaskedLM", "AlbertConfig", **ENCODER, embedding_size=33),
        text(),
    ),
    Family(
        "T5",
        built(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        seq2seq,
    ),
    Family(
        "BART",
        built(
            "BartForConditionalGeneration",
            "BartConfig",
            **TOWER,
            vocab_size=VOCAB,
            max_position_embeddings=33,
        ),
        seq2seq,
    ),
    Family(
        "GPT-2",
        built(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCAB,
            n_positions=33,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            initializer_range=SCALE,
            bos_token_id=1,
            eos_token_id=2,
        ),
        text(),
    ),
    Family(
        "Llama",
        built("LlamaForCausalLM", "LlamaConfig", **LLAMA),
        text(),
        depth=16,  # embedding, 2 x (query, key, value, output, gate, up, down), head
    ),
    Family(
        "Mixtral",
        built("MixtralForCausalLM", "MixtralConfig", **MIXTRAL),
        text(),
        # As Llama's, and the router takes another expert where two are nearly equal: with all 4
        # taken, w8a16 is at 0.9999.
        depth=16,
    ),
    Family(
        "Mamba",
        built(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            state_size=8,
            num_hidden_layers=2,
            use_cache=False,
        ),
        lambda: {"input_ids": tokens(2, LENGTH, below=VOCAB)},
    ),
    Family(
        "Whisper",
        built(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **TOWER,
            vocab_size=VOCAB,
            num_mel_bins=17,
            max_source_positions=31,
            max_target_positions=33,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
        ),
        lambda: {
            "input_features": values(2, 17, 62),
            "decoder_input_ids": tokens(2, 7, below=VOCAB),
        },
    ),
    Family(
        "Wav2Vec2",
        built(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **(ENCODER | {"vocab_size": 33}),
            conv_dim=(32, 32, 32),
            conv_kernel=(10, 3, 3),
            conv_stride=(5, 2, 2),
            num_conv_pos_embeddings=15,
            num_conv_pos_embedding_groups=4,
        ),
        lambda: {"input_values": values(2, 700)},
    ),
    Family(
        "CLAP",
        dual("ClapModel", "ClapConfig", text_config=TEXT_TOWER, audio_config=CLAP_AUDIO),
        lambda: (
            text()()
            | {"input_features": values(2, 1, 256, 16), "is_longer": torch.zeros(2, 1).bool()}
        ),
    ),
    Family("VITS", vits, text()),
    Family("ViT", built("ViTForImageClassification", "ViTConfig", **VISION), image),
    Family(
        "Swin",
        built(
            "SwinForImageClassification",
            "SwinConfig",
            **STAGES,
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
        ),
        image,
        depth=27,  # patches, 4 x (4 of attention, 2 of the perceptron), merging, head
    ),
    Family(
        "ConvNeXt",
        built(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            **STAGES,
            hidden_sizes=(24, 40, 64),
            depths=(1, 2, 1),
            num_stages=3,
            layer_scale_init_value=1.0,
        ),
        image,
    ),
    Family(
        "DETR",
        detr,
        image,
        depth=45,  # ResNet 9, projection, 2 x 6 encoder, 2 x 10 decoder, box head 3
    ),
    Family(
        "SAM",
        built("SamModel", "SamConfig", **SAM),
        sam_inputs,
        depth=52,  # patches, 2 x 6, neck 2, decoder 2 x 14 and 4, upscaling 2, masks 3
    ),
    Family(
        "DPT",
        built(
            "DPTForDepthEstimation",
            "DPTConfig",
            **(VISION | {"num_hidden_layers": 4}),
            backbone_out_indices=(0, 1, 2, 3),
            neck_hidden_sizes=(16, 24, 32, 48),
            fusion_hidden_size=32,
        ),
        image,
        depth=52,  # patches, 4 x 6 encoder, 4 reassembling, 4 x 5 fusing, head 3
    ),
    Family(
        "BLIP",
        dual(
            "BlipForConditionalGeneration",
            "BlipConfig",
            text_config=TEXT_TOWER,
            vision_config=VISION,
        ),
        image_and_text,
    ),
    Family(
        "CLIP",
        dual(
            "CLIPModel",
            "CLIPConfig",
            text_config=TEXT_TOWER,
            vision_config=VISION,
        ),
        image_and_text,
    ),
]
