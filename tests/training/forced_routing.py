"""Makes a model route as it is told: turns ids and gates back into what its routers return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Forced = Callable[[Any, Any, Tensor, Tensor], Any]


def scattered(experts: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """A row over all experts with the values at theirs."""
    return torch.zeros_like(like, dtype=values.dtype).scatter_(-1, experts.reshape_as(values), values)


def triple(module: Any, output: Any, experts: Tensor, gates: Tensor) -> Any:
    return output[0], gates.reshape_as(output[1]), experts.reshape_as(output[2])


def switch(module: Any, output: Any, experts: Tensor, gates: Tensor) -> Any:
    mask, probability, logits = output
    one_hot = torch.nn.functional.one_hot(experts, module.num_experts).reshape_as(mask)
    return one_hot, gates.reshape_as(probability), logits


def nllb(module: Any, output: Any, experts: Tensor, gates: Tensor) -> Any:
    first = torch.nn.functional.one_hot(experts[..., 0], module.num_experts)
    return first, scattered(experts, gates, output[1]), output[2]


def jetmoe(module: Any, output: Any, experts: Tensor, gates: Tensor) -> Any:
    order = experts.flatten().argsort(stable=True)
    sizes = torch.bincount(experts.flatten(), minlength=module.num_experts).tolist()
    return order, order // module.top_k, gates.flatten()[order], sizes, output[4]


def llama4(module: Any, output: Any, experts: Tensor, gates: Tensor) -> Any:
    return scattered(experts, gates, output[1]), output[1]


FORCED: Mapping[str, Forced] = {
    "SwitchTransformersTop1Router": switch,
    "NllbMoeTop2Router": nllb,
    "JetMoeTopKGating": jetmoe,
    "Llama4Router": llama4,
}


@contextmanager
def forced(modules: Mapping[Any, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """In the block, each of these modules routes its tokens as told: ids [n, K] and gates [n, K]."""
    handles = []
    for module, (experts, gates) in modules.items():
        name = type(module).__name__
        if name == "DbrxExperts":  # it is told where to send its tokens
            handles.append(
                module.register_forward_pre_hook(lambda m, given, e=experts, g=gates: (given[0], e, g))
            )
        else:
            of = FORCED.get(name, triple)
            handles.append(
                module.register_forward_hook(
                    lambda m, given, output, of=of, e=experts, g=gates: of(m, output, e, g)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
