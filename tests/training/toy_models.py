"""Small mixture-of-experts models of transformers with random weights, and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from training.collection.model import Loaded

VOCABULARY = 257
END = 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "pad_token_id": END,
    "bos_token_id": None,
    "eos_token_id": END,
    "max_position_embeddings": 256,
}
LATENT_ATTENTION = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "head_dim": None,
}


def decoder(config: Callable[..., Any], **changes: Any) -> Callable[[], Any]:
    return lambda: hf.AutoModelForCausalLM.from_config(config(**SIZES | changes))


def translator(config: Callable[..., Any], **sizes: Any) -> Callable[[], Any]:
    special = {"pad_token_id": END, "eos_token_id": END, "decoder_start_token_id": 0}
    return lambda: hf.AutoModelForSeq2SeqLM.from_config(config(vocab_size=VOCABULARY, **special | sizes))


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "switch": translator(
        hf.SwitchTransformersConfig,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=8,
    ),
    "nllb-moe": translator(
        hf.NllbMoeConfig,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_layers=4,
        decoder_layers=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_experts=8,
    ),
    "mixtral": decoder(hf.MixtralConfig, num_local_experts=8),
    "qwen2-moe": decoder(hf.Qwen2MoeConfig, num_experts=8, shared_expert_intermediate_size=32),
    "qwen3-moe": decoder(hf.Qwen3MoeConfig, num_experts=8, norm_topk_prob=True),
    "olmoe": decoder(hf.OlmoeConfig, num_experts=8),
    "deepseek-v2": decoder(
        hf.DeepseekV2Config, **LATENT_ATTENTION, n_routed_experts=8, topk_method="group_limited_greedy"
    ),
    "deepseek-v3": decoder(hf.DeepseekV3Config, **LATENT_ATTENTION, n_routed_experts=8),
    "gpt-oss": decoder(hf.GptOssConfig, num_local_experts=8),
    "phimoe": decoder(hf.PhimoeConfig, num_local_experts=8),
    "jetmoe": decoder(hf.JetMoeConfig, num_local_experts=8, kv_channels=8),
    "granitemoe": decoder(hf.GraniteMoeConfig, num_local_experts=8),
    "dbrx": decoder(
        hf.DbrxConfig,
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=256,
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    ),
    "jamba": decoder(
        hf.JambaConfig,
        num_experts=8,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        use_mamba_kernels=False,
    ),
    "llama4": decoder(hf.Llama4TextConfig, num_local_experts=8, intermediate_size_mlp=32),
}


# Found by what their routers return; nothing in this project names them.
OTHERS: Mapping[str, Callable[[], Any]] = {
    "qwen3-next": decoder(
        hf.Qwen3NextConfig,
        num_experts=8,
        shared_expert_intermediate_size=16,
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "glm4-moe": decoder(hf.Glm4MoeConfig, n_routed_experts=8, n_shared_experts=1),
    "ernie4.5-moe": decoder(hf.Ernie4_5_MoeConfig, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1),
    "dots1": decoder(hf.Dots1Config, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1),
    "minimax-m2": decoder(hf.MiniMaxM2Config, num_local_experts=8, rotary_dim=8),
    "flex-olmo": decoder(hf.FlexOlmoConfig, num_experts=8),
    "granitemoe-shared": decoder(hf.GraniteMoeSharedConfig, num_local_experts=8, shared_intermediate_size=16),
}


def toy(family: str, seed: int = 0) -> Any:
    """A model whose routers tell experts well apart: random weights as usual would make near ties."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **OTHERS}[family]().eval()
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(part in ("router", "gate") for part in path.split(".")):
            tensor.data.normal_()
    return model


def loaded(family: str, seed: int = 0) -> Loaded:
    model = toy(family, seed)
    return Loaded(family, model, tokenizer(), bool(model.config.is_encoder_decoder))


def random_ids(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    """Token ids of texts of these lengths, none of them a special one."""
    return [np.random.default_rng([seed, at]).integers(1, END, n).tolist() for at, n in enumerate(lengths)]


def tokenizer() -> Any:
    """Bytes as tokens, and one that ends a text."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=alphabet | {"</s>": END}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", pad_token="</s>")


def saved(folder: Path, family: str = "olmoe", seed: int = 0) -> Path:
    toy(family, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
