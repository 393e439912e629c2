"""The three shapes of the reference model, as models of transformers, and their answers for windows of text.

    python -c "from training.reference_moe import config, model; print(model.build(config.ReferenceConfig()))"

Between `tokenizer` and `loop`. Written by save_pretrained, they load like any other model: nothing of ours is
needed to run them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from training.reference_moe.config import HEAD_WIDTH, ReferenceConfig

# Of all weights at the start. With hidden states of some 200 numbers, the usual 0.02 begins slowly.
INITIAL_DEVIATION = 0.04
# A decoder begins with the token that ends texts, as T5's does. Not among the config's declared fields.
START: dict[str, Any] = {"decoder_start_token_id": 0}


@dataclass(frozen=True)
class Answer:
    """What a model says of a batch of windows.

    logits: of the tokens in `targets`, each from the ones before it. routers: logits over the experts, for
    each layer that has any, in the order in which tokens pass them.
    """

    logits: Float[Tensor, "B T V"]
    targets: Int64[Tensor, "B T"]
    routers: tuple[Float[Tensor, "N E"], ...]

    @property
    def losses(self) -> Float[Tensor, "B T"]:
        """Cross-entropy of each target, in nats."""
        return functional.cross_entropy(self.logits.float().transpose(1, 2), self.targets, reduction="none")


def build(config: ReferenceConfig) -> Any:
    """A model with random weights, the same for the same seed."""
    torch.manual_seed(config.seed)
    return _switch(config) if config.shape == "switch" else _decoder(config)


def _decoder(config: ReferenceConfig) -> Any:
    dense = config.shape == "dense"
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.expert_width * (config.top_k if dense else 1),
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // HEAD_WIDTH,
            num_experts=1 if dense else config.experts,
            num_experts_per_tok=1 if dense else config.top_k,
            norm_topk_prob=True,
            router_aux_loss_coef=config.balance,
            max_position_embeddings=config.context,
            initializer_range=INITIAL_DEVIATION,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=0,
        )
    )
    # A little faster on one core than a loop over the experts. Chosen at run time, not part of what is saved.
    model.set_experts_implementation("grouped_mm")
    return model


def _switch(config: ReferenceConfig) -> Any:
    half = config.layers // 2
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=config.vocabulary,
            d_model=config.width,
            d_kv=HEAD_WIDTH,
            d_ff=config.expert_width,
            num_heads=config.width // HEAD_WIDTH,
            num_layers=half,
            num_decoder_layers=half,
            num_sparse_encoder_layers=half // 2,
            num_sparse_decoder_layers=half // 2,
            num_experts=config.experts,
            expert_capacity=config.context,  # no token is left out
            router_jitter_noise=0.0,
            dropout_rate=0.0,
            router_aux_loss_coef=config.balance,
            pad_token_id=0,
            eos_token_id=0,
            **START,
        )
    )


def answer(model: Any, window: Int64[Tensor, "B T"]) -> Answer:
    """What the model says of windows of text. An encoder reads the first half, a decoder tells the second."""
    if not model.config.is_encoder_decoder:
        output = model.model(input_ids=window[:, :-1], use_cache=False, output_router_logits=True)
        return Answer(model.lm_head(output.last_hidden_state), window[:, 1:], tuple(output.router_logits))
    half = window.shape[1] // 2
    targets = window[:, half:]
    start = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
    output = model(
        input_ids=window[:, :half],
        decoder_input_ids=torch.cat([start, targets[:, :-1]], 1),
        use_cache=False,
        output_router_logits=True,
    )
    routers = (*output.encoder_router_logits, *output.decoder_router_logits)
    return Answer(output.logits, targets, tuple(logits.flatten(0, -2) for logits in routers))


def balance_loss(routers: tuple[Float[Tensor, "N E"], ...], top_k: int) -> Float[Tensor, ""]:
    """1 where every expert of every layer is used alike, more where not.

    Fedus, Zoph and Shazeer 2021, equation 4, for each layer on its own: added up over layers first, as
    transformers has it, one layer's favourites hide behind another's.
    """
    losses = []
    for logits in routers:
        share = logits.float().softmax(-1).mean(0)
        used = torch.bincount(
            logits.topk(min(top_k, logits.shape[-1])).indices.flatten(), minlength=logits.shape[-1]
        )
        losses.append(logits.shape[-1] * (share * used / used.sum()).sum())
    return torch.stack(losses).mean()


def count_parameters(model: Any) -> tuple[int, int]:
    """Parameters in all, and those that a token meets: without the experts that it is not routed to."""
    shared = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." not in name)
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    top_k = 1 if model.config.is_encoder_decoder else model.config.num_experts_per_tok
    return shared + experts, shared + experts * top_k // model.config.num_experts
