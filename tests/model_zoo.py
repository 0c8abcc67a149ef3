"""Tiny random-weight transformers models, one for each way that real code spells an efficient architecture.

`build(name)` gives a model and its keyword inputs. Nothing is downloaded: weights are random under a fixed seed, so two builds of
one name are equal. `NAMES` lists them all, `FAMILIES` groups them by what is to be recognised in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 128
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model: `transformers` type, auto class and configuration, and a maker of inputs."""

    family: str
    model_type: str
    config: Mapping[str, Any]
    auto_class: str = "AutoModelForCausalLM"
    inputs: Callable[[], Inputs] = field(default_factory=lambda: lambda: {"input_ids": tokens()})


def tokens(batch: int = 2, length: int = 64) -> torch.Tensor:
    """Token ids `[batch, length]`, int64, without special tokens, under a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, VOCABULARY - 5, (batch, length), generator=generator)


def normal(*shape: int) -> torch.Tensor:
    """Standard normal float32 of `shape` under a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _long() -> Inputs:
    return {"input_ids": tokens(length=128)}


def _seq2seq() -> Inputs:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=32)}


def _speech() -> Inputs:
    return {"input_features": normal(2, 16, 128), "decoder_input_ids": tokens(length=32)}


def _image() -> Inputs:
    return {"pixel_values": normal(2, 3, 32, 32)}


def _decoder(**config: Any) -> dict[str, Any]:
    """The usual decoder of width 64: two layers, four heads over two key-value heads. A value None drops the key."""
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **SPECIAL_TOKENS,
    }
    dropped = config.pop("drop", ())
    return {key: value for key, value in {**base, **config}.items() if key not in dropped}


_ONE_KV_HEAD_PER_HEAD = {"drop": ("num_key_value_heads",)}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_LATENT_HEADS = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 32, **_LATENT_HEADS}
_DEEPSEEK_EXPERTS = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}

_ATTENTION = {
    "llama": Entry(family="attention", model_type="llama", config=_decoder()),
    "mistral_swa": Entry(family="attention", model_type="mistral", config=_decoder(sliding_window=16, head_dim=16)),
    "gemma2": Entry(
        family="attention",
        model_type="gemma2",
        config=_decoder(
            sliding_window=16,
            head_dim=16,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            query_pre_attn_scalar=16,
        ),
    ),
    "gpt2": Entry(
        family="attention",
        model_type="gpt2",
        config={"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 128},
    ),
    "bert": Entry(family="attention", model_type="bert", auto_class="AutoModel", config=_decoder(**_ONE_KV_HEAD_PER_HEAD)),
    "t5": Entry(family="attention", model_type="t5", auto_class="AutoModel", config=_T5, inputs=_seq2seq),
    "whisper": Entry(
        family="attention",
        model_type="whisper",
        auto_class="AutoModel",
        config={
            "vocab_size": VOCABULARY,
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "d_model": 64,
            "max_source_positions": 64,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            **SPECIAL_TOKENS,
        },
        inputs=_speech,
    ),
    "deepseek_v3_mla": Entry(
        family="attention",
        model_type="deepseek_v3",
        config=_decoder(**_MLA, **_DEEPSEEK_EXPERTS, first_k_dense_replace=2),
    ),
    "bloom": Entry(
        family="attention",
        model_type="bloom",
        config={"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    ),
    "longformer": Entry(
        family="attention",
        model_type="longformer",
        auto_class="AutoModel",
        config=_decoder(**_ONE_KV_HEAD_PER_HEAD, attention_window=[16, 16]),
    ),
    "gpt_oss_attn": Entry(
        family="attention",
        model_type="gpt_oss",
        config=_decoder(head_dim=16, sliding_window=16, **_LOCAL_EXPERTS),
    ),
    "diffllama": Entry(family="attention", model_type="diffllama", config=_decoder()),
    "vit": Entry(
        family="attention",
        model_type="vit",
        auto_class="AutoModel",
        config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 32,
            "patch_size": 8,
        },
        inputs=_image,
    ),
    "llama_bidirectional": Entry(family="attention", model_type="llama", config=_decoder(is_causal=False)),
}

_MOE = {
    "mixtral": Entry(family="moe", model_type="mixtral", config=_decoder(**_LOCAL_EXPERTS, sliding_window=None)),
    "qwen3_moe": Entry(
        family="moe",
        model_type="qwen3_moe",
        config=_decoder(**_EXPERTS, moe_intermediate_size=32, decoder_sparse_step=1, head_dim=16),
    ),
    "deepseek_v3": Entry(
        family="moe",
        model_type="deepseek_v3",
        config=_decoder(**_MLA, **_DEEPSEEK_EXPERTS, first_k_dense_replace=1),
    ),
    "olmoe": Entry(family="moe", model_type="olmoe", config=_decoder(**_EXPERTS)),
    "gpt_oss": Entry(family="moe", model_type="gpt_oss", config=_decoder(head_dim=16, sliding_window=16, **_LOCAL_EXPERTS)),
    "granitemoe": Entry(family="moe", model_type="granitemoe", config=_decoder(**_LOCAL_EXPERTS)),
    "switch_transformers": Entry(
        family="moe",
        model_type="switch_transformers",
        auto_class="AutoModel",
        config={
            **_T5,
            "num_experts": 4,
            "expert_capacity": 16,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 2,
        },
        inputs=_seq2seq,
    ),
    "llama4": Entry(
        family="moe",
        model_type="llama4_text",
        config=_decoder(
            head_dim=16,
            intermediate_size_mlp=128,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            attention_chunk_size=32,
            no_rope_layers=[1, 0],
        ),
    ),
}

_RECURRENCE = {
    "mamba": Entry(family="recurrence", model_type="mamba", config=_MAMBA),
    "mamba_seqscan": Entry(family="recurrence", model_type="mamba", config={**_MAMBA, "use_associative_scan": False}),
    "mamba2": Entry(
        family="recurrence",
        model_type="mamba2",
        config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
            **SPECIAL_TOKENS,
        },
    ),
    "falcon_h1": Entry(
        family="recurrence",
        model_type="falcon_h1",
        config=_decoder(
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=16,
            mamba_d_ssm=128,
            head_dim=16,
        ),
    ),
    "jamba": Entry(
        family="recurrence",
        model_type="jamba",
        config=_decoder(
            num_experts=1,
            num_experts_per_tok=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    "rwkv": Entry(
        family="recurrence",
        model_type="rwkv",
        config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "context_length": 256,
            "attention_hidden_size": 64,
            "intermediate_size": 128,
        },
    ),
    "recurrent_gemma": Entry(
        family="recurrence",
        model_type="recurrent_gemma",
        config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "lru_width": 64,
            "attention_window_size": 32,
            "block_types": ["recurrent", "attention"],
            "pad_token_id": 0,
        },
    ),
    "xlstm": Entry(
        family="recurrence",
        model_type="xlstm",
        config={
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_blocks": 2,
            "num_heads": 4,
            "chunk_size": 16,
            "pad_token_id": 0,
            "max_inference_chunksize": 64,
        },
    ),
    "minimax_lightning": Entry(
        family="recurrence",
        model_type="minimax",
        config=_decoder(**_LOCAL_EXPERTS, head_dim=16, block_size=32, layer_types=["linear_attention", "linear_attention"]),
    ),
    "qwen3_next": Entry(
        family="recurrence",
        model_type="qwen3_next",
        config=_decoder(
            **_EXPERTS,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_conv_kernel_dim=4,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            decoder_sparse_step=1,
        ),
        inputs=_long,
    ),
    "kimi_linear": Entry(
        family="recurrence",
        model_type="kimi_linear",
        config=_decoder(
            **_LATENT_HEADS,
            num_key_value_heads=4,
            layer_types=["linear_attention", "full_attention"],
            linear_num_heads=4,
            linear_head_dim=16,
            q_lora_rank=None,
            num_experts=4,
            num_experts_per_token=2,
            moe_intermediate_size=32,
            n_group=1,
            topk_group=1,
        ),
        inputs=_long,
    ),
}

ENTRIES: Mapping[str, Entry] = MappingProxyType({**_ATTENTION, **_MOE, **_RECURRENCE})
NAMES: tuple[str, ...] = tuple(ENTRIES)
FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {family: tuple(name for name in NAMES if ENTRIES[name].family == family) for family in ("attention", "moe", "recurrence")}
)


def build(
    name: str, attention: str | None = None, experts: str | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Inputs]:
    """The model `name` in eval mode and its keyword inputs.

    `attention` and `experts` choose transformers' implementation ("eager", "sdpa", ...; "grouped_mm", "batched_mm", ...), None its
    default. `dtype` casts the weights; inputs keep theirs (ids int64, features float32). KeyError for a name not in `NAMES`.
    """
    import transformers

    if name not in ENTRIES:
        raise KeyError(f"Expected one of {', '.join(NAMES)} but got {name=}")
    entry = ENTRIES[name]
    config = transformers.AutoConfig.for_model(entry.model_type, **entry.config)
    choices = {"attn_implementation": attention, "experts_implementation": experts}
    torch.manual_seed(0)
    auto_class = getattr(transformers, entry.auto_class)
    model = auto_class.from_config(config, **{key: value for key, value in choices.items() if value is not None})
    if dtype is not None:
        model = model.to(dtype)
    return model.eval(), entry.inputs()


def result(output: Any) -> torch.Tensor:
    """The tensor to compare: logits, or the last hidden state of a model without a head."""
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits
