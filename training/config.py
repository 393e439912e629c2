"""Every knob of a training run, with its unit. `specmoe train --help` lists them from here."""

from __future__ import annotations

from dataclasses import dataclass

from training.errors import ConfigInvalid
from training.precision import PRECISIONS


@dataclass(frozen=True)
class TrainConfig:
    """How a predictor is trained.

    passes: times each training token is visited (count).
    batch_tokens: tokens of a step, over all processes (count; a multiple of block_tokens).
    block_tokens: consecutive tokens drawn together, so that their history is built once (count).
    prefixes: prefixes of seen layers tried for each token of a step, the empty one among them (count).
    near: by how much more each of the four layers after the last one seen counts (1).
    learning_rate: peak step size of AdamW (1).
    weight_decay: decoupled decay of weight matrices and embeddings (1 / step size).
    warmup_steps: steps until the peak step size; after it, a cosine down to 0 (count).
    restarts: times the cosine begins again at the peak, in equal parts of the run (count).
    averaging: decay of the running average of the weights, which is what is evaluated and served (per step).
    drop_token_id: share of tokens trained as if no token id were known (0 to 1).
    drop_gates: share of blocks trained as if no gate weights were known (0 to 1).
    drop_history: share of tokens trained as if they began their sequence (0 to 1).
    drop_pair: share of known pairs of token ids trained as if they had never been seen together (0 to 1).
    rare_token: share of known token ids trained as if they had never been seen before (0 to 1).
    permute_experts: share of blocks with the experts of each layer permuted, token ids hidden (0 to 1).
    drop_layers: share of a token's layers trained as if nothing were known of them (0 to 1).
    mixup: concentration of the beta distribution by which two tokens are mixed; 0 mixes none (1).
    noise: standard deviation of a factor on every weight of the inputs (1).
    evaluate_every: passes between two looks at the validation split (count).
    patience: looks without a better validation loss before the run stops early (count).
    precision: of products while training; bfloat16 where the hardware has it (float32 or bfloat16).
    seed: of every random choice (integer).
    """

    passes: int = 12
    batch_tokens: int = 256
    block_tokens: int = 4
    prefixes: int = 4
    near: float = 0.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.2
    warmup_steps: int = 100
    restarts: int = 0
    averaging: float = 0.9985
    drop_token_id: float = 0.15
    drop_gates: float = 0.1
    drop_history: float = 0.1
    drop_pair: float = 0.2
    rare_token: float = 0.05
    permute_experts: float = 0.0
    drop_layers: float = 0.0
    mixup: float = 0.0
    noise: float = 0.0
    evaluate_every: int = 1
    patience: int = 4
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("passes", "batch_tokens", "block_tokens", "prefixes", "evaluate_every", "patience"):
            demand(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        demand(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "between 0 and 1")
        for name in ("near", "weight_decay", "warmup_steps", "restarts", "seed"):
            demand(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("averaging", "drop_token_id", "drop_gates", "drop_history", "drop_pair", "rare_token"):
            demand(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 or more and below 1")
        demand(0 <= self.drop_layers < 1, "drop_layers", self.drop_layers, "0 or more and below 1")
        demand(0 <= self.permute_experts <= 1, "permute_experts", self.permute_experts, "0 to 1")
        demand(0 <= self.mixup <= 10, "mixup", self.mixup, "0 to 10")
        demand(0 <= self.noise <= 1, "noise", self.noise, "0 to 1")
        demand(self.precision in PRECISIONS, "precision", self.precision, " or ".join(PRECISIONS))
        demand(
            self.batch_tokens % self.block_tokens == 0,
            "batch_tokens",
            self.batch_tokens,
            f"a multiple of block_tokens ({self.block_tokens})",
        )


@dataclass(frozen=True)
class PrefixConfig:
    """The size of the `prefix` predictor.

    width: of the trunk (channels).
    hidden: of a residual block (channels).
    blocks: residual blocks (count).
    decays: of the averages over past tokens; the first is 0, the previous token alone (per token).
    window: how many tokens back the same token id is looked for (count).
    repeats: newest places with the same id that count (count).
    repeat_decay: what a place counts beside the next newer one (0 to 1).
    similar: tokens of the window that count whose routing was most like this token's so far; 0: none (count).
    preceding_decays: of averages of the experts that preceding tokens share; 0: the last ones' (per token).
    earlier_width: of what the trunk is told of each average and of the repeats (channels).
    reach: layers ahead of which pairs of experts tell, one of a layer seen and one to come (layers).
    layer_decay: of the second sum over the layers seen, from the last one back (per layer, 0 to 1).
    token_width: of the embedding of a token, or of a pair of them (channels).
    recent_tokens: past tokens whose ids are remembered (count).
    dropout: inside the trunk (0 to 1).
    input_dropout: on routed experts and token embeddings (0 to 1).
    """

    width: int = 256
    hidden: int = 512
    blocks: int = 1
    decays: tuple[float, ...] = (0.0, 0.7, 0.97)
    window: int = 144
    repeats: int = 3
    repeat_decay: float = 0.6
    similar: int = 8
    preceding_decays: tuple[float, ...] = (0.0, 0.6, 0.9)
    earlier_width: int = 64
    reach: int = 8
    layer_decay: float = 0.5
    token_width: int = 88
    recent_tokens: int = 2
    dropout: float = 0.1
    input_dropout: float = 0.1

    def __post_init__(self) -> None:
        sizes = (
            "width",
            "hidden",
            "blocks",
            "repeats",
            "earlier_width",
            "reach",
            "token_width",
            "recent_tokens",
        )
        for name in sizes:
            demand(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        demand(self.similar >= 0, "similar", self.similar, "0 or more")
        demand(
            self.window >= max(self.repeats, self.recent_tokens, self.similar),
            "window",
            self.window,
            f"at least repeats ({self.repeats}), similar ({self.similar}) and "
            f"recent_tokens ({self.recent_tokens})",
        )
        demand(0 < self.layer_decay < 1, "layer_decay", self.layer_decay, "between 0 and 1")
        for name in ("repeat_decay", "dropout", "input_dropout"):
            demand(0 <= getattr(self, name) < 1, name, getattr(self, name), "0 or more and below 1")
        demand(
            self.decays[:1] == (0.0,) and bool(self.decays[1:]) and all(0 < d < 1 for d in self.decays[1:]),
            "decays",
            self.decays,
            "0, then one or more between 0 and 1",
        )
        demand(
            bool(self.preceding_decays) and all(0 <= d < 1 for d in self.preceding_decays),
            "preceding_decays",
            self.preceding_decays,
            "one or more, 0 or more and below 1",
        )


def demand(condition: bool, name: str, value: object, expected: str) -> None:
    """Raises ConfigInvalid where the condition does not hold."""
    if not condition:
        raise ConfigInvalid(
            f"{name} is {value}, expected {expected}.", remedy=f"Set --{name.replace('_', '-')} accordingly."
        )
