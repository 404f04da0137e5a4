"""Tiny random models of many architectures, each with at least four units, and what they are trained on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 96
BATCH, LENGTH = 2, 10
Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One row of the table.

    Args:
        make: builds the model; the caller has seeded the generator.
        batch: step -> keyword arguments of forward.
        loss: (outputs, batch) -> loss.
        is_fast: whether it is among the few that every run of the suite trains.
        reason: why the first step has not torch's bits where whole blocks are units; empty: it has them.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Any, Batch], Tensor]
    is_fast: bool = False
    reason: str = ""


ARCHITECTURES: dict[str, Architecture] = {}
SHARED_INPUT = "every block uses {}, and each more than once"
"""The gradient of what several units use is a sum over all uses. A unit hands over the sum over its own, so the terms
are grouped differently."""


def architecture(name: str, family: str, batch: Callable[[int], Batch], loss: Any = None, **settings: Any) -> Any:
    """Enter a model builder into the table."""

    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert name not in ARCHITECTURES
        if name.startswith("torchvision") and not HAS_TORCHVISION:
            return make
        ARCHITECTURES[name] = Architecture(
            name=name, family=family, make=make, batch=batch, loss=loss or own_loss, **settings
        )
        return make

    return enter


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def tokens(step: int, length: int = LENGTH, low: int = 3) -> Tensor:
    """int64 [BATCH, length], without the special tokens 0, 1 and 2."""
    return torch.randint(low, VOCAB, (BATCH, length), generator=generator(step))


def noise(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(step))


def text(step: int) -> Batch:
    ids = tokens(step)
    return {"input_ids": ids, "labels": ids}


def padded_text(step: int) -> Batch:
    """The second row is padded at its end."""
    ids = tokens(step)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def plain_tokens(step: int) -> Batch:
    return {"tokens": tokens(step)}


def images(step: int, size: int = 16) -> Batch:
    return {"pixel_values": noise(step, BATCH, 3, size, size), "labels": torch.tensor([1, 4])}


def plain_images(step: int) -> Batch:
    return {"x": noise(step, 8, 3, 32, 32)}


def own_loss(outputs: Any, batch: Batch) -> Tensor:
    """The loss that a Hugging Face model computes from `labels`."""
    loss: Tensor = outputs.loss
    return loss


def next_token_loss(logits: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())


def class_loss(logits: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, torch.arange(logits.shape[0]) % logits.shape[1])


def find_torchvision() -> bool:
    """Whether torchvision can be imported, its models at least.

    Its compiled part needs the very build of torch that it was made for, and without it even the Python part refuses
    to be imported, and transformers with it. The models need none of its operators: their names are enough.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return False
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    return True


HAS_TORCHVISION = find_torchvision()


def hugging_face(auto_class: str, model_type: str, **sizes: Any) -> nn.Module:
    """`AutoModelFor...` of a config of random weights."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model: nn.Module = getattr(transformers, auto_class).from_config(config)
    return model


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


def causal(model_type: str, **sizes: Any) -> nn.Module:
    return hugging_face("AutoModelForCausalLM", model_type, **sizes)


# -- decoder-only


@architecture("Llama", "decoder", padded_text, is_fast=True)
def llama() -> nn.Module:
    return causal("llama", **GROUPED)


@architecture("Qwen2", "decoder", text)
def qwen2() -> nn.Module:
    return causal("qwen2", **GROUPED, tie_word_embeddings=True)


@architecture("Qwen3", "decoder", text)
def qwen3() -> nn.Module:
    return causal("qwen3", **GROUPED)


@architecture("Mistral", "decoder", text)
def mistral() -> nn.Module:
    return causal("mistral", **GROUPED, sliding_window=4)


@architecture("Gemma2", "decoder", text)
def gemma2() -> nn.Module:
    return causal("gemma2", **GROUPED, sliding_window=4, query_pre_attn_scalar=8)


@architecture("Gemma3", "decoder", text)
def gemma3() -> nn.Module:
    return causal("gemma3_text", **GROUPED, sliding_window=4, query_pre_attn_scalar=8)


@architecture("GPT-2", "decoder", text, is_fast=True)
def gpt2() -> nn.Module:
    return causal("gpt2", vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1)


@architecture("OPT", "decoder", padded_text)
def opt() -> nn.Module:
    return causal("opt", **SIZES, ffn_dim=48, word_embed_proj_dim=24, layerdrop=0.2)


@architecture("Phi", "decoder, parallel blocks", text)
def phi() -> nn.Module:
    return causal("phi", **SIZES)


@architecture("Phi-3", "decoder", text)
def phi3() -> nn.Module:
    return causal("phi3", **SIZES, num_key_value_heads=2)


@architecture("Falcon", "decoder, parallel blocks", text)
def falcon() -> nn.Module:
    return causal("falcon", **SIZES, new_decoder_architecture=False, parallel_attn=True, multi_query=True)


@architecture("GPT-NeoX", "decoder, parallel blocks", text)
def gpt_neox() -> nn.Module:
    return causal("gpt_neox", **SIZES)


@architecture("GPT-J", "decoder, parallel blocks", text)
def gptj() -> nn.Module:
    return causal("gptj", vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4)


@architecture("Bloom", "decoder", padded_text)
def bloom() -> nn.Module:
    return causal("bloom", vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, hidden_dropout=0.1)


@architecture("StarCoder2", "decoder", text)
def starcoder2() -> nn.Module:
    return causal("starcoder2", **SIZES, num_key_value_heads=2)


@architecture("OLMo", "decoder", text)
def olmo() -> nn.Module:
    return causal("olmo", **SIZES)


@architecture("OLMo-2", "decoder", text)
def olmo2() -> nn.Module:
    return causal("olmo2", **SIZES)


@architecture("Cohere", "decoder, parallel blocks", text)
def cohere() -> nn.Module:
    return causal("cohere", **SIZES, num_key_value_heads=2)


@architecture("StableLM", "decoder", text)
def stablelm() -> nn.Module:
    return causal("stablelm", **SIZES, num_key_value_heads=2)


@architecture("MPT", "decoder", text)
def mpt() -> nn.Module:
    return causal("mpt", vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, max_seq_len=64)


# -- mixtures of experts


@architecture("Mixtral", "decoder, experts", text, is_fast=True)
def mixtral() -> nn.Module:
    return causal("mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)


@architecture("Qwen2-MoE", "decoder, experts", text)
def qwen2_moe() -> nn.Module:
    return causal(
        "qwen2_moe",
        **SIZES,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        output_router_logits=True,
    )


@architecture("Qwen3-MoE", "decoder, experts", text)
def qwen3_moe() -> nn.Module:
    return causal(
        "qwen3_moe",
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        output_router_logits=True,
    )


@architecture("OLMoE", "decoder, experts", text)
def olmoe() -> nn.Module:
    return causal("olmoe", **SIZES, num_experts=4, num_experts_per_tok=2, output_router_logits=True)


LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}


@architecture("DeepSeek-V2", "decoder, experts", text)
def deepseek_v2() -> nn.Module:
    return causal("deepseek_v2", **SIZES, num_key_value_heads=4, **LATENT, topk_method="group_limited_greedy")


@architecture("DeepSeek-V3", "decoder, experts", text)
def deepseek_v3() -> nn.Module:
    return causal("deepseek_v3", **SIZES, num_key_value_heads=4, **LATENT)


@architecture("GPT-OSS", "decoder, experts", text)
def gpt_oss() -> nn.Module:
    return causal("gpt_oss", **GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)


# -- encoders


def masked(model_type: str, **sizes: Any) -> nn.Module:
    return hugging_face("AutoModelForMaskedLM", model_type, **{**SIZES, **sizes})


@architecture("BERT", "encoder", padded_text, is_fast=True)
def bert() -> nn.Module:
    return masked("bert")


@architecture("RoBERTa", "encoder", padded_text)
def roberta() -> nn.Module:
    return masked("roberta")


@architecture("DistilBERT", "encoder", padded_text)
def distilbert() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
    return hugging_face("AutoModelForMaskedLM", "distilbert", **sizes, max_position_embeddings=64)


@architecture("ALBERT", "encoder, shared layers", padded_text, is_fast=True)
def albert() -> nn.Module:
    return masked("albert", embedding_size=16, num_hidden_groups=2, num_hidden_layers=4)


@architecture("DeBERTa-v2", "encoder", padded_text, reason=SHARED_INPUT.format("the relative embeddings"))
def deberta() -> nn.Module:
    return masked(
        "deberta-v2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
        conv_kernel_size=3,
    )


@architecture("ELECTRA", "encoder", padded_text)
def electra() -> nn.Module:
    return masked("electra", embedding_size=16)


@architecture("ModernBERT", "encoder", padded_text)
def modernbert() -> nn.Module:
    return masked("modernbert", global_attn_every_n_layers=2, local_attention=4)


# -- vision


def classifier(model_type: str, **sizes: Any) -> nn.Module:
    return hugging_face("AutoModelForImageClassification", model_type, num_labels=5, **sizes)


VISION = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


@architecture("ViT", "vision", images)
def vit() -> nn.Module:
    return classifier("vit", **VISION)


@architecture("Swin", "vision", images)
def swin() -> nn.Module:
    return classifier("swin", image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=2)


@architecture("DINOv2", "vision", images)
def dinov2() -> nn.Module:
    return classifier("dinov2", **VISION)


@architecture("torchvision ResNet-18", "vision, convolutions", plain_images, class_loss, is_fast=True)
def resnet() -> nn.Module:
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)


@architecture("torchvision MobileNetV3", "vision, convolutions", plain_images, class_loss)
def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    model: nn.Module = mobilenet_v3_small(num_classes=7, width_mult=0.5)
    return model


@architecture("torchvision ConvNeXt", "vision, convolutions", plain_images, class_loss)
def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, 48, 2), CNBlockConfig(48, None, 1)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=7)


@architecture("torchvision ViT", "vision", plain_images, class_loss)
def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=7
    )


# -- encoder-decoder


def encoded_text(step: int) -> Batch:
    return {"input_ids": tokens(step), "labels": tokens(step + 50, length=7)}


def speech(step: int) -> Batch:
    return {"input_features": noise(step, BATCH, 8, 32), "labels": tokens(step, length=7)}


@architecture(
    "T5", "encoder-decoder", encoded_text, is_fast=True, reason=SHARED_INPUT.format("position bias and encoder output")
)
def t5() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hugging_face("AutoModelForSeq2SeqLM", "t5", **sizes, decoder_start_token_id=0)


SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@architecture("BART", "encoder-decoder", encoded_text, reason=SHARED_INPUT.format("the encoder's output"))
def bart() -> nn.Module:
    return hugging_face("AutoModelForSeq2SeqLM", "bart", **SEQ2SEQ, max_position_embeddings=64, encoder_layerdrop=0.3)


@architecture("Whisper", "encoder-decoder, speech", speech, reason=SHARED_INPUT.format("the encoder's output"))
def whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
    return hugging_face("AutoModelForSpeechSeq2Seq", "whisper", **SEQ2SEQ, **sizes)


# -- recurrent


@architecture("Mamba", "state space", text)
def mamba() -> nn.Module:
    return causal("mamba", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=8, pad_token_id=0)


@architecture("Mamba-2", "state space", text)
def mamba2() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "pad_token_id": 0}
    return causal("mamba2", **sizes, num_heads=4, head_dim=16, n_groups=1, chunk_size=8)


@architecture("RWKV", "recurrent", text)
def rwkv() -> nn.Module:
    return causal("rwkv", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, context_length=64)


class RecurrentLM(nn.Module):
    """Embedding, recurrent layers that are called one by one, and a head; int64 [B, T] -> [B, T, VOCAB]."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList(kind(32, 32, batch_first=True) for _ in range(3))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.drop(x) + layer(x)[0]
        logits: Tensor = self.head(x)
        return logits


@architecture("LSTM language model", "recurrent", plain_tokens, next_token_loss, is_fast=True)
def lstm() -> nn.Module:
    return RecurrentLM(nn.LSTM)


@architecture("GRU language model", "recurrent", plain_tokens, next_token_loss)
def gru() -> nn.Module:
    return RecurrentLM(nn.GRU)


class TorchTransformer(nn.Module):
    """`nn.Transformer` that predicts its own input; int64 [B, T] -> [B, T, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.trunk = nn.Transformer(32, 4, 2, 2, 48, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        logits: Tensor = self.head(self.trunk(x, x, tgt_mask=mask, tgt_is_causal=True))
        return logits


@architecture(
    "nn.Transformer",
    "encoder-decoder",
    plain_tokens,
    next_token_loss,
    reason=SHARED_INPUT.format("the encoder's output"),
)
def torch_transformer() -> nn.Module:
    return TorchTransformer()


# -- several modalities


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def pairs(step: int) -> Batch:
    return {"input_ids": tokens(step), "pixel_values": noise(step, BATCH, 3, 16, 16), "return_loss": True}


@architecture("CLIP", "text and images", pairs)
def clip() -> nn.Module:
    return hugging_face(
        "AutoModel",
        "clip",
        text_config={**TOWER, "vocab_size": VOCAB, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config={**TOWER, "image_size": 16, "patch_size": 4},
        projection_dim=16,
    )


IMAGE_TOKEN = VOCAB - 1


def picture_and_text(step: int) -> Batch:
    ids = torch.cat([torch.full((BATCH, 16), IMAGE_TOKEN), tokens(step).clamp(max=IMAGE_TOKEN - 1)], dim=1)
    return {"input_ids": ids, "pixel_values": noise(step, BATCH, 3, 16, 16), "labels": ids}


@architecture("LLaVA", "text and images", picture_and_text)
def llava() -> nn.Module:
    return hugging_face(
        "AutoModelForImageTextToText",
        "llava",
        text_config={**GROUPED, "model_type": "llama"},
        vision_config={**TOWER, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 4},
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )


def qwen_vl_input(step: int) -> Batch:
    """One picture of 4 x 4 patches per row, merged to 4 tokens each."""
    start = torch.full((BATCH, 1), VOCAB - 3)
    pictures = torch.full((BATCH, 4), IMAGE_TOKEN)
    ids = torch.cat([start, pictures, tokens(step).clamp(max=VOCAB - 5)], dim=1)
    patches = noise(step, BATCH * 16, 3 * 2 * 4 * 4)
    is_picture = (ids == IMAGE_TOKEN).int()
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": grid,
        "mm_token_type_ids": is_picture,
        "labels": ids,
    }


@architecture("Qwen2-VL", "text and images", qwen_vl_input)
def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return hugging_face(
        "AutoModelForImageTextToText",
        "qwen2_vl",
        text_config={**SIZES, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    )
