"""Listens to routers while a model runs, and hands out what they decided, token by token.

The hooks look and return nothing: the model computes the same bits as without them. What they see stays where
the model runs until it is taken.

    recorder = Recorder(find_routers(model, run), hidden=False)
    with recorder.listening(batch=2):
        model(input_ids)  # [2, T]
    routing = recorder.take("")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int16
from torch import Tensor

from training.collection.routers import Router, Stack, watched
from training.errors import RouterUnknown

FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Routing:
    """What a stack's routers decided about T tokens of each of B sequences.

    hidden: what each router saw, clipped to what half precision holds; None where it was not asked for.
    """

    experts: Int16[np.ndarray, "B T L K"]
    gates: Float32[np.ndarray, "B T L K"]
    hidden: Float16[np.ndarray, "B T L H"] | None


@dataclass
class _Heard:
    """What one router decided, a part for each time it ran: [B, t, K], hidden states [B, t, H]."""

    experts: list[Tensor]
    gates: list[Tensor]
    hidden: list[Tensor]


class Recorder:
    """Records what the routers of these stacks decide. hidden: whether to keep what they see, too."""

    def __init__(self, stacks: Sequence[Stack], *, hidden: bool) -> None:
        self.stacks = tuple(stacks)
        self._hidden = hidden
        self._routers = {router.path: router for stack in stacks for router in stack.routers}
        self._heard: dict[str, _Heard] = {}

    @contextmanager
    def listening(self, batch: int) -> Iterator[None]:
        """Record all that runs in the block, on `batch` sequences side by side; forget what was before."""
        self._heard = {path: _Heard([], [], []) for path in self._routers}

        def look(path: str, module: Any, arguments: tuple[Any, ...], keywords: Any, output: Any) -> None:
            router, heard = self._routers[path], self._heard[path]
            routed = router.read(module, arguments, output)
            if routed is None:
                raise RouterUnknown(
                    f"{path} returned no routing this time, though it did for the first tokens.",
                    remedy="Such a model cannot be recorded.",
                )
            heard.experts.append(routed.experts.reshape(batch, -1, router.top_k))
            heard.gates.append(routed.gates.reshape(batch, -1, router.top_k))
            if self._hidden:
                seen = arguments[0] if arguments else next(iter(keywords.values()))
                half = seen.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
                heard.hidden.append(half.reshape(batch, -1, router.hidden_size))

        with watched(((path, router.module) for path, router in self._routers.items()), look):
            yield

    def take(self, stack: Stack, tokens: int) -> Routing:
        """What a stack decided about `tokens` tokens of each sequence.

        Raises RouterUnknown where a router was asked about more or fewer.
        """
        heard = [self._heard.pop(router.path) for router in stack.routers]
        for router, of in zip(stack.routers, heard, strict=True):
            _check_count(router, sum(part.shape[1] for part in of.experts), tokens)
        return Routing(
            experts=_together([of.experts for of in heard], torch.int16),
            gates=_together([of.gates for of in heard], torch.float32),
            hidden=_together([of.hidden for of in heard], torch.float16) if self._hidden else None,
        )


def _together(parts: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Any:
    """Parts [B, t, ...] of each layer as one array [B, T, L, ...]."""
    whole = torch.stack([torch.cat(tuple(of), dim=1) for of in parts], dim=2)
    return whole.to(dtype).cpu().numpy()


def _check_count(router: Router, came: int, tokens: int) -> None:
    if came != tokens:
        raise RouterUnknown(
            f"{router.path} was asked about {came} tokens of each sequence, expected {tokens}.",
            remedy="Such a model cannot be recorded: its routers do not see each token once.",
        )
