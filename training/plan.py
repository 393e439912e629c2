"""What a training step looks at: which blocks, how much of each token is shown, what is withheld.

Decided for the whole step from its number and the seed alone, so a resumed run and a run on several processes
see the same examples as an uninterrupted one on one process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from training.config import TrainConfig
from training.examples import Batch, Examples


@dataclass(frozen=True)
class Plan:
    """One step. Arrays have a row for each token place of each block; places past a block's end are not used.

    blocks: their numbers.
    seen: number of layers shown, for each prefix tried.
    hide_token, hide_history, make_rare: tokens shown without id, without history, with ids as if never seen.
    hide_pair: tokens shown as if their id had never been seen after the one before.
    hide_gates: blocks shown without gates.
    """

    blocks: Int64[np.ndarray, "N"]
    seen: Int64[np.ndarray, "N T P"]
    hide_token: Bool[np.ndarray, "N T"]
    hide_history: Bool[np.ndarray, "N T"]
    make_rare: Bool[np.ndarray, "N T"]
    hide_pair: Bool[np.ndarray, "N T"]
    hide_gates: Bool[np.ndarray, "N"]

    def part(self, rank: int, world: int) -> Plan:
        """The share of one of several processes."""
        mine = slice(rank, None, world)
        return Plan(
            self.blocks[mine],
            self.seen[mine],
            self.hide_token[mine],
            self.hide_history[mine],
            self.make_rare[mine],
            self.hide_pair[mine],
            self.hide_gates[mine],
        )


def steps_per_pass(blocks: Examples[Batch], config: TrainConfig) -> int:
    """Steps that visit every block once; the last one may be smaller."""
    return -(-len(blocks) // _blocks_per_step(config))


def plan_step(blocks: Examples[Batch], config: TrainConfig, step: int) -> Plan:
    """The plan of step `step`, counted from 0 over all passes."""
    in_pass = steps_per_pass(blocks, config)
    order = np.random.default_rng([config.seed, step // in_pass]).permutation(len(blocks))
    first = step % in_pass * _blocks_per_step(config)
    chosen = order[first : first + _blocks_per_step(config)]
    rng = np.random.default_rng([config.seed, step, 1])
    shape = (len(chosen), config.block_tokens)
    tried = (len(chosen), 1) if blocks.shares_prefix else shape
    seen = rng.integers(0, blocks.spec.num_layers, (*tried, config.prefixes))
    seen = np.broadcast_to(seen, (*shape, config.prefixes)).copy()
    seen[..., 0] = 0  # the whole-token forecast is the main product
    return Plan(
        blocks=chosen,
        seen=seen,
        hide_token=rng.random(shape) < config.drop_token_id,
        hide_history=rng.random(shape) < config.drop_history,
        make_rare=rng.random(shape) < config.rare_token,
        hide_pair=rng.random(shape) < config.drop_pair,
        hide_gates=rng.random(len(chosen)) < config.drop_gates,
    )


def _blocks_per_step(config: TrainConfig) -> int:
    return config.batch_tokens // config.block_tokens
