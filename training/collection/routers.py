"""Finds the routers of a model, whatever it is called, by what its modules return for a few tokens.

Nearly every model of `transformers` routes alike: a module takes hidden states and returns a tuple of logits,
gates and ids of each token's top-k experts, which the experts then take. `find_routers` runs the model once
on five tokens and keeps the modules that return such a tuple. What returns anything else has a reader of its
own in `training.collection.readers`.

    python -c "from training.collection.routers import find_routers; help(find_routers)"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from training.collection.readers import READERS, Reader, Routed, read_triple
from training.errors import RouterUnknown

# A number of tokens that is no other size of a small tensor.
PROBE_TOKENS = 5
LOOKS_LIKE_A_ROUTER = re.compile(r"Router|TopK|Topk|Gating|MoEGate")


@dataclass(frozen=True)
class Router:
    """One router. path: its module's name within the model; it has one for each layer with experts."""

    path: str
    module: nn.Module
    read: Reader
    num_experts: int
    top_k: int
    hidden_size: int

    def weights(self) -> Float32[np.ndarray, "E H+1"] | None:
        """Those by which it makes logits of hidden states, last their bias; None where it is not so simple.

        What is added to choose experts only, as DeepSeek-V3 does to balance their load, is left out.
        """
        named = [(name.rpartition(".")[2], p.detach()) for name, p in self.module.named_parameters()]
        matrices = [p for _, p in named if p.shape == (self.num_experts, self.hidden_size)]
        if len(matrices) != 1:
            return None
        biases = [p for name, p in named if name == "bias" and p.shape == (self.num_experts,)]
        bias = biases[0] if biases else matrices[0].new_zeros(self.num_experts)
        return torch.cat([matrices[0], bias[:, None]], 1).float().cpu().numpy()


@dataclass(frozen=True)
class Stack:
    """The routers that see the same tokens, in the order in which these pass them: the layers of a trace.

    name: "" where the model has one stack; else what tells it from the others (encoder, decoder).
    """

    name: str
    routers: tuple[Router, ...]

    @property
    def encodes(self) -> bool:
        """Whether it is the encoder's."""
        return "encoder" in self.routers[0].path.split(".")

    @property
    def num_experts(self) -> int:
        return self.routers[0].num_experts

    @property
    def top_k(self) -> int:
        return self.routers[0].top_k

    @property
    def hidden_size(self) -> int:
        return self.routers[0].hidden_size

    def weights(self) -> Float32[np.ndarray, "L E H+1"] | None:
        """Of all routers (`Router.weights`); None where one has none."""
        each = [weights for router in self.routers if (weights := router.weights()) is not None]
        return np.stack(each) if len(each) == len(self.routers) else None


def find_routers(model: nn.Module, run: Callable[[int], object]) -> tuple[Stack, ...]:
    """The stacks of a model.

    run: runs the model once on one sequence of so many tokens, in each stack.

    Raises RouterUnknown where there is no router, where modules look like routers but return something else,
    or where the routers of a stack differ in experts or top-k.
    """
    found: dict[str, Router] = {}
    unread: dict[str, str] = {}

    def look(path: str, module: nn.Module, arguments: tuple[Any, ...], keywords: Any, output: Any) -> None:
        read = READERS.get(type(module).__name__, read_triple)
        routed = _try(read, module, arguments, output)
        if routed is not None:
            hidden = arguments[0] if arguments else next(iter(keywords.values()))
            found[path] = Router(
                path, module, read, routed.num_experts, routed.experts.shape[-1], hidden.shape[-1]
            )
        elif LOOKS_LIKE_A_ROUTER.search(type(module).__name__):
            unread[path] = f"{type(module).__name__} returns {_described(output)}"

    with watched(model.named_modules(), look):
        run(PROBE_TOKENS)
    # A layer that hands its router's answer on is no router itself.
    layers = {above for path in found for above in _above(path)}
    routers = [router for path, router in found.items() if path not in layers]
    _refuse_unread(model, routers, unread)
    return _stacks(routers)


@contextmanager
def watched(modules: Iterator[tuple[str, nn.Module]], look: Callable[..., None]) -> Iterator[None]:
    """In the block, `look(path, module, arguments, keywords, output)` is called after each module ran."""
    handles = [
        module.register_forward_hook(
            lambda module, arguments, keywords, output, path=path: look(
                path, module, arguments, keywords, output
            ),
            with_kwargs=True,
        )
        for path, module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _try(read: Reader, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Routed | None:
    """What a module routed the probe's tokens to, if it is a router."""
    routed = read(module, arguments, output)
    fits = (
        routed is not None
        and routed.experts.shape == routed.gates.shape
        and routed.experts.ndim in (2, 3)
        and routed.experts.shape[:-1].numel() == PROBE_TOKENS
        and 1 <= routed.experts.shape[-1] <= routed.num_experts
    )
    return routed if fits else None


def _refuse_unread(model: nn.Module, routers: Sequence[Router], unread: dict[str, str]) -> None:
    """Raise RouterUnknown where nothing was found, or something that looks like a router is not read."""
    name = type(model).__name__
    # A router's parts and its neighbours within the same layer need not be read.
    known = {router.path.rpartition(".")[0] for router in routers}
    left = {path: what for path, what in unread.items() if not any(map(known.__contains__, _above(path)))}
    if left:
        path, what = next(iter(left.items()))
        raise RouterUnknown(
            f"{name}: {len(left)} modules look like routers and cannot be read, the first is {path}: {what};"
            f" expected (logits, gates, ids), the last two [tokens, top-k].",
            remedy="Add a reader for the module's class to training/collection/readers.py.",
        )
    if not routers:
        raise RouterUnknown(
            f"{name} has no layers with experts: none of its modules returns the ids and gates of experts.",
            remedy="Give a mixture-of-experts model; docs/collecting.md tells how routers are found.",
        )


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that a module is in."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _stacks(routers: Sequence[Router]) -> tuple[Stack, ...]:
    """Routers by the list of layers they are in: `decoder.block.3.mlp.router` is in `decoder.block`."""
    by_list: dict[str, list[Router]] = {}
    for router in routers:
        by_list.setdefault(re.split(r"\.\d+(?:\.|$)", router.path)[0], []).append(router)
    stacks = []
    for path, members in by_list.items():
        shapes = {(router.num_experts, router.top_k, router.hidden_size) for router in members}
        if len(shapes) > 1:
            told = " and ".join(f"{experts} experts, top-{k}" for experts, k, _ in sorted(shapes))
            raise RouterUnknown(
                f"The routers in {path} differ: {told}. A trace has the same in all layers.",
                remedy="Such a model cannot be recorded.",
            )
        others = {part for other in by_list if other != path for part in other.split(".")}
        name = "-".join(part for part in path.split(".") if part not in others) if len(by_list) > 1 else ""
        stacks.append(Stack(name, tuple(members)))
    return tuple(stacks)


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
    if isinstance(output, (tuple, list)):
        return f"({', '.join(map(_described, output))})"
    return type(output).__name__
