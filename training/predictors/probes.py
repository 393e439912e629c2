"""Predictors that read a hidden state and nothing else: `next-gate`, `hidden-linear` and `hidden-mlp`.

Comes after `hidden_states`, before `loop` and `probe_graphs`. h is what the last router that ran was given, s
the number of layers seen; token start, s = 0, comes behind the last layer of the token before. Where no h is
told, all of them answer with what is usual in each layer.

    next-gate      z_l = (W_l h + b_l) / c_l    W_l, b_l: the router of layer l itself; nothing at s = 0
    hidden-linear  z_l = A_s,l n(h) + a_s,l     n: divided by its root mean square
    hidden-mlp     z = head(norm(blocks(B n(h) + d_s)))

The first is the guess of mixtral-offloading (Eliseev and Mazur 2023): hidden states change little from
layer to layer, so a later router likes much the same. Its h is normalised as its own layer does it.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from traces.spec import RoutingSpec
from training.dropout import dropout
from training.errors import HiddenMissing
from training.examples import Batch, Examples
from training.hidden_states import HiddenBatch, HiddenExamples
from training.predictor_configs import HiddenLinearConfig, HiddenMLPConfig, NextGateConfig, ProbeConfig
from training.predictors.predictor import Predictor
from training.predictors.prefix import Residual
from training.vocabulary import Vocabulary

TINY = 1e-8
# Tokens by which the spread of a router's logits is known well enough.
SPREAD_TOKENS = 2048


def scaled(h: Float[Tensor, "*B H"]) -> Float[Tensor, "*B H"]:
    """Divided by its root mean square; zeros stay zeros."""
    return h / (h * h).mean(-1, keepdim=True).clamp(min=TINY).sqrt()


def is_told(h: Float[Tensor, "*B H"]) -> Bool[Tensor, "*B"]:
    """Whether there is one: zeros stand for none, and no model makes them."""
    return (h != 0).any(-1)


def kept(h: Float[Tensor, "B P H"], drop: float, training: bool) -> Float[Tensor, "B P H"]:
    """While training, a share of the forecasts as if no hidden state were known."""
    return h * (torch.rand(*h.shape[:-1], 1, device=h.device) >= drop) if training else h


class Probe(Predictor):
    """usual: logits where no hidden state is told."""

    reads_ids = reads_gates = False

    def __init__(
        self, spec: RoutingSpec, config: ProbeConfig, vocabulary: Vocabulary, hidden_size: int
    ) -> None:
        super().__init__()
        self.spec, self.config, self.vocabulary = spec, config, vocabulary
        self.hidden_size = hidden_size
        self.usual = nn.Parameter(torch.zeros(spec.num_layers, spec.num_experts))

    def forward(
        self, batch: HiddenBatch, rows: Int64[Tensor, "B R"], seen: Int64[Tensor, "B P"]
    ) -> Float[Tensor, "B P L E"]:
        """Logits of every expert of every layer."""
        return self.answer(kept(batch.at(seen), self.config.drop_hidden, self.training), seen)

    def answer(self, h: Float[Tensor, "*B H"], seen: Int64[Tensor, "*B"]) -> Float[Tensor, "*B L E"]:
        """Logits from a hidden state."""
        return torch.where(self.reads(h, seen)[..., None, None], self.read(h, seen), self.usual)

    def reads(self, h: Float[Tensor, "*B H"], seen: Int64[Tensor, "*B"]) -> Bool[Tensor, "*B"]:
        """Whether the hidden state says anything."""
        return is_told(h)

    @abstractmethod
    def read(self, h: Float[Tensor, "*B H"], seen: Int64[Tensor, "*B"]) -> Float[Tensor, "*B L E"]:
        """What it says."""


class NextGate(Probe):
    """gates: the model's routers, which are not trained. spread: c, the standard deviation of their logits,
    so that calibration begins with numbers of usual size."""

    config: NextGateConfig

    def __init__(
        self, spec: RoutingSpec, config: NextGateConfig, vocabulary: Vocabulary, hidden_size: int
    ) -> None:
        super().__init__(spec, config, vocabulary, hidden_size)
        empty = torch.zeros(spec.num_layers, spec.num_experts, hidden_size + 1)
        self.gates = nn.Parameter(empty, requires_grad=False)
        self.spread = nn.Parameter(torch.ones(spec.num_layers, 1), requires_grad=False)

    @torch.no_grad()
    def prepare(self, train: Examples[Batch]) -> None:
        """Take over the routers. Raises HiddenMissing where the recording has not kept them."""
        routers = train.hidden.routers if isinstance(train, HiddenExamples) else None
        if routers is None:
            raise HiddenMissing(
                f"The traces of {self.spec.model} come without their routers' weights.",
                remedy="Record them again with specmoe collect --hidden; of a router that is no single "
                "matrix there are none.",
            )
        self.gates.copy_(torch.from_numpy(routers))
        batch = next(train.in_order(SPREAD_TOKENS))
        h = batch.newest[:, 1:].float()  # type: ignore[attr-defined]
        self.spread.copy_(self.read(h, torch.ones(h.shape[:2])).std((0, 1, 3))[:, None])

    def reads(self, h: Float[Tensor, "*B H"], seen: Int64[Tensor, "*B"]) -> Bool[Tensor, "*B"]:
        """Of its own token alone."""
        return is_told(h) & (seen > 0)

    def read(self, h: Float[Tensor, "*B H"], seen: Int64[Tensor, "*B"]) -> Float[Tensor, "*B L E"]:
        """What the routers would say."""
        matrix, bias = self.gates[..., :-1].flatten(0, 1), self.gates[..., -1].flatten()
        return _by_layer(nn.functional.linear(h, matrix, bias), self.spec) / self.spread


class HiddenLinear(Probe):
    """A matrix for each number of layers seen."""

    config: HiddenLinearConfig

    def __init__(
        self, spec: RoutingSpec, config: HiddenLinearConfig, vocabulary: Vocabulary, hidden_size: int
    ) -> None:
        super().__init__(spec, config, vocabulary, hidden_size)
        outputs = spec.num_layers * spec.num_experts
        self.weight = nn.Parameter(torch.zeros(spec.num_layers, hidden_size, outputs))
        self.bias = nn.Embedding(spec.num_layers, outputs)
        nn.init.zeros_(self.bias.weight)

    def read(self, h: Float[Tensor, "*B H"], seen: Int64[Tensor, "*B"]) -> Float[Tensor, "*B L E"]:
        """One matrix after the other, so that none is copied for each token."""
        source = seen.clamp(max=self.spec.num_layers - 1)  # with all seen, nothing is left to forecast
        x = dropout(scaled(h), self.config.input_dropout, self.training)
        said = self.bias(source)
        for layers, weight in enumerate(self.weight):
            said = said + (x * (source == layers)[..., None]) @ weight
        return _by_layer(said, self.spec)


class HiddenMLP(Probe):
    """A small trunk."""

    config: HiddenMLPConfig

    def __init__(
        self, spec: RoutingSpec, config: HiddenMLPConfig, vocabulary: Vocabulary, hidden_size: int
    ) -> None:
        super().__init__(spec, config, vocabulary, hidden_size)
        self.inner = nn.Linear(hidden_size, config.width, bias=False)
        self.source = nn.Embedding(spec.num_layers + 1, config.width)
        self.blocks = nn.Sequential(
            *(Residual(config.width, config.hidden, config.dropout) for _ in range(config.blocks))
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, spec.num_layers * spec.num_experts)
        nn.init.normal_(self.inner.weight, std=0.5 / math.sqrt(hidden_size))
        nn.init.normal_(self.source.weight, std=0.02)

    def read(self, h: Float[Tensor, "*B H"], seen: Int64[Tensor, "*B"]) -> Float[Tensor, "*B L E"]:
        """From the trunk, all layers at once."""
        x = self.inner(dropout(scaled(h), self.config.input_dropout, self.training)) + self.source(seen)
        y = dropout(self.norm(self.blocks(x)), self.config.dropout, self.training)
        return _by_layer(self.head(y), self.spec)


def _by_layer(logits: Float[Tensor, "*B L*E"], spec: RoutingSpec) -> Float[Tensor, "*B L E"]:
    return logits.unflatten(-1, (spec.num_layers, spec.num_experts))
