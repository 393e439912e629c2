"""What the reference model is made of and how it is trained; every field is an option of the command.

specmoe reference-moe train --texts runs/texts --run runs/reference --width 256 --tokens 20000000
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config import demand
from training.precision import PRECISIONS
from training.reference_moe.tokenizer import BYTES

HEAD_WIDTH = 32


@dataclass(frozen=True)
class ReferenceConfig:
    """One reference model and its training. The defaults are the model that is shipped.

    shape: decoder, dense (one expert a layer, as wide as top_k), or switch (encoder and decoder, top-1).
    vocabulary: tokens of the tokenizer, all bytes among them (count).
    width: of the hidden states (numbers; a multiple of 32, a head of attention).
    layers: of the model; of a switch half of them encode, and every second one has experts (count).
    experts: of a layer (count).
    top_k: experts that a token is routed to (count).
    expert_width: of an expert's hidden layer (numbers).
    context: tokens that the model sees at once (count).
    tokens: to train on, drawn anew for each step, from all domains alike (count).
    batch_size: windows of `context` tokens in a step (count).
    learning_rate: peak step size of AdamW (1).
    warmup_steps: steps until the peak; after it, half a cosine down to 0 (count).
    weight_decay: decoupled decay of matrices (1 / step size).
    balance: weight of the loss that has the experts of each layer used alike (1).
    precision: of products, float32 or bfloat16; weights are float32 either way.
    seed: of weights and of the texts' order (integer).
    """

    shape: str = "decoder"
    vocabulary: int = 4096
    width: int = 192
    layers: int = 8
    experts: int = 32
    top_k: int = 4
    expert_width: int = 80
    context: int = 256
    tokens: int = 5_324_800
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 150
    weight_decay: float = 0.1
    balance: float = 0.01
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        switch = self.shape == "switch"
        demand(self.shape in SHAPES, "shape", self.shape, f"one of {', '.join(SHAPES)}")
        demand(BYTES < self.vocabulary <= 1 << 16, "vocabulary", self.vocabulary, "257 to 65536")
        demand(0 < self.width <= 8192, "width", self.width, "1 to 8192")
        demand(self.width % HEAD_WIDTH == 0, "width", self.width, f"a multiple of {HEAD_WIDTH}")
        demand(0 < self.layers <= 128, "layers", self.layers, "1 to 128")
        demand(not switch or self.layers % 4 == 0, "layers", self.layers, "a multiple of 4 for a switch")
        demand(1 < self.experts <= 1024, "experts", self.experts, "2 to 1024")
        demand(0 < self.top_k <= self.experts, "top_k", self.top_k, f"1 to {self.experts}, the experts")
        demand(not switch or self.top_k == 1, "top_k", self.top_k, "1 for a switch")
        demand(0 < self.expert_width <= 65536, "expert_width", self.expert_width, "1 to 65536")
        demand(8 <= self.context <= 65536, "context", self.context, "8 to 65536")
        demand(self.context % 2 == 0, "context", self.context, "an even number")
        demand(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        demand(self.steps >= 1, "tokens", self.tokens, f"{self.step_tokens} at least, what a step draws")
        demand(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "between 0 and 1")
        for name in ("warmup_steps", "weight_decay", "balance", "seed"):
            demand(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        demand(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")

    @property
    def step_tokens(self) -> int:
        """Tokens that are drawn for a step."""
        return self.batch_size * self.context

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.tokens // self.step_tokens


SHAPES = ("decoder", "dense", "switch")
DEFAULTS = {
    "decoder": ReferenceConfig(),
    "dense": ReferenceConfig(shape="dense"),
    "switch": ReferenceConfig(
        shape="switch", experts=64, top_k=1, expert_width=128, learning_rate=2e-3, tokens=2_000_000
    ),
}
