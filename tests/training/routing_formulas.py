"""How each family routes, in numpy from its router's weights: what recordings are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

Formula = Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()


def logits_of(module: Any, hidden: Any) -> Float[np.ndarray, "n E"]:
    """Of a router that is a linear layer, has one, or has its weights."""
    linear = getattr(module, "classifier", getattr(module, "layer", module))
    logits = array(hidden).reshape(-1, hidden.shape[-1]) @ array(linear.weight).T
    bias = getattr(linear, "bias", None)
    return logits if bias is None else logits + array(bias)


def softmax(values: Float[np.ndarray, "n E"]) -> Float[np.ndarray, "n E"]:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def largest(values: Float[np.ndarray, "n E"], count: int) -> Int[np.ndarray, "n K"]:
    return np.argsort(-values, axis=-1)[:, :count]


def share(values: np.ndarray) -> np.ndarray:
    return values / values.sum(-1, keepdims=True)


def of_softmax(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities = softmax(logits_of(module, hidden))
    experts = largest(probabilities, module.top_k)
    return experts, np.take_along_axis(probabilities, experts, -1)


def shares_of_softmax(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    experts, gates = of_softmax(module, hidden)
    return experts, share(gates)


def by_config(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    return (shares_of_softmax if module.norm_topk_prob else of_softmax)(module, hidden)


def softmax_of_top(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    logits = logits_of(module, hidden)
    experts = largest(logits, module.top_k)
    return experts, softmax(np.take_along_axis(logits, experts, -1))


def within_groups(module: Any, scores: np.ndarray, of_group: np.ndarray) -> Int[np.ndarray, "n K"]:
    """The best experts of the best groups. of_group: what a group is worth, [n, groups]."""
    size = module.num_experts // module.num_group
    allowed = np.repeat(np.zeros_like(of_group, bool), size, -1)
    for row, groups in enumerate(largest(of_group, module.topk_group)):
        for group in groups:
            allowed[row, group * size : (group + 1) * size] = True
    return largest(np.where(allowed, scores, -np.inf), module.top_k)


def deepseek_v2(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    scores = softmax(logits_of(module, hidden))
    best = scores.reshape(len(scores), module.num_group, -1).max(-1)
    experts = within_groups(module, scores, best)
    return experts, np.take_along_axis(scores, experts, -1) * module.routed_scaling_factor


def deepseek_v3(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    scores = sigmoid(logits_of(module, hidden))
    biased = scores + array(module.e_score_correction_bias)
    two_best = np.sort(biased.reshape(len(scores), module.num_group, -1), -1)[..., -2:].sum(-1)
    experts = within_groups(module, biased, two_best)
    return experts, share(np.take_along_axis(scores, experts, -1)) * module.routed_scaling_factor


def phimoe(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    """SparseMixer without its noise: each of two experts against those nearly as good."""
    logits = logits_of(module, hidden)
    experts, gates, left = [], [], logits
    for _ in range(2):
        best = largest(left, 1)
        top = np.take_along_axis(left, best, -1)
        scale = np.maximum(np.abs(logits), top)
        near = np.where((top - logits) / scale > 2 * module.router_jitter_noise, -np.inf, left)
        gates.append(np.take_along_axis(softmax(near), best, -1))
        experts.append(best)
        left = left.copy()
        np.put_along_axis(left, best, -np.inf, -1)
    return np.concatenate(experts, -1), np.concatenate(gates, -1)


def switch(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities = softmax(logits_of(module, hidden))
    experts = largest(probabilities, 1)
    return experts, np.take_along_axis(probabilities, experts, -1)


def nllb(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    probabilities = softmax(logits_of(module, hidden))
    experts = largest(probabilities, 2)
    return experts, share(np.take_along_axis(probabilities, experts, -1))


def llama4(module: Any, hidden: Any) -> tuple[np.ndarray, np.ndarray]:
    logits = logits_of(module, hidden)
    experts = largest(logits, module.top_k)
    return experts, sigmoid(np.take_along_axis(logits, experts, -1))


FORMULAS: Mapping[str, Formula] = {
    "switch": switch,
    "nllb-moe": nllb,
    "mixtral": shares_of_softmax,
    "qwen2-moe": by_config,
    "qwen3-moe": by_config,
    "olmoe": by_config,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "gpt-oss": softmax_of_top,
    "phimoe": phimoe,
    "jetmoe": softmax_of_top,
    "granitemoe": softmax_of_top,
    "dbrx": shares_of_softmax,
    "jamba": of_softmax,
    "llama4": llama4,
}
