"""Finds the routers of a model of transformers: the modules that return logits, gates and ids of experts.

attach -> find_routers -> one forward pass over a few tokens -> Router, one for each layer with experts

Families go by other names, but what their routers return is the same. Five classes of routers return
something else (Switch Transformers, NLLB-MoE, JetMoE, Llama 4, DBRX) and are not found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specmoe_client.predictions import RoutingShape
from specmoe_client.streaming.routing import wrong

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# As many as no other axis of a router's answer is likely to have.
TOKENS = 5


@dataclass(frozen=True)
class Router:
    """A router, and the block it is in: what comes before the experts of this layer is done in there."""

    module: nn.Module
    block: nn.Module
    num_experts: int
    top_k: int


def routing_of(answer: Any) -> tuple[Tensor, Tensor]:
    """Ids and gates `[..., K]` of what a router returned."""
    return answer[2], answer[1]


def find_routers(model: PreTrainedModel) -> list[Router]:
    """Those of a decoder, in the order in which a token meets them.

    Runs the model once, without a cache. Raises RequestInvalid where it cannot run so, or has no router.
    """
    name = type(model).__name__
    if model.training:
        raise wrong(f"{name} is in training mode.", "Call model.eval() first.")
    answers = _answers(model, name)
    inner = [path for path, answer in answers.items() if _is_routing(answer)]
    # What hands a router's answer on is a layer, not a router.
    paths = [path for path in inner if not any(other.startswith(f"{path}.") for other in inner)]
    if not paths:
        raise wrong(
            f"{name} has no router that can be listened to: no module of it returns logits, gates and ids.",
            "Give a mixture-of-experts model; the client's README tells which ones can be followed.",
        )
    return [_router(model, path, answers[path]) for path in paths]


def shape_of(routers: list[Router]) -> RoutingShape:
    """What a version for this model looks like. Raises RequestInvalid where the routers differ."""
    sizes = sorted({(router.num_experts, router.top_k) for router in routers})
    if len(sizes) > 1:
        told = " and ".join(f"{experts} experts, top-{k}" for experts, k in sizes)
        raise wrong(f"The model's routers differ: {told}.", "There is no version for such a model.")
    return RoutingShape(len(routers), *sizes[0])


def _answers(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What each module returns for a few tokens, by its path, in the order in which they end."""
    import torch

    answers: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _, __, answer, path=path: answers.update({path: answer}))
        for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64, device=model.device), use_cache=False)
    except Exception as error:
        raise wrong(
            f"{name} cannot run {TOKENS} tokens alone ({type(error).__name__}: {error}).",
            "Give a decoder that takes input_ids; those with an encoder are not supported.",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return answers


def _is_routing(answer: Any) -> bool:
    import torch

    if not (isinstance(answer, tuple) and len(answer) >= 3 and all(map(torch.is_tensor, answer[:3]))):
        return False
    logits, gates, ids = answer[:3]
    return bool(
        not ids.is_floating_point()
        and gates.is_floating_point()
        and gates.shape == ids.shape
        and ids.dim() >= 2
        and ids.numel() == TOKENS * ids.shape[-1]
        and ids.shape[-1] <= logits.shape[-1]
    )


def _router(model: PreTrainedModel, path: str, answer: Any) -> Router:
    import torch

    above = path.rpartition(".")[0]
    while isinstance(model.get_submodule(above), torch.nn.ModuleList):  # it is never called
        above = above.rpartition(".")[0]
    ids, _ = routing_of(answer)
    return Router(model.get_submodule(path), model.get_submodule(above), answer[0].shape[-1], ids.shape[-1])
