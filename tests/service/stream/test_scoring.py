"""Which tokens are scored waits for a quiet moment, but not for ever."""

from __future__ import annotations

import numpy as np

from service.stream.scoring import MOST_TOKENS, Kept, Scoring
from speculation.live import LiveScores
from tests.toy_version import TOY_SPEC

SHAPE = (TOY_SPEC.num_layers, TOY_SPEC.num_experts)
ROUTING = np.tile(np.arange(TOY_SPEC.top_k), (TOY_SPEC.num_layers, 1))


def test_a_backlog_presses_until_some_of_it_is_scored() -> None:
    scores = LiveScores(TOY_SPEC, {})
    scoring = Scoring(scores, share=1.0)
    for row in range(MOST_TOKENS // 2):
        assert not scoring.presses
        scoring.begin(row, None)
        scoring.keep([row], 0, np.full((1, *SHAPE), 0.5, np.float32))
        scoring.finish(row, ROUTING)
    assert scoring.presses
    scoring.score_one()
    assert not scoring.presses
    assert scores.tokens == 1


class Learning:
    """A client that counts what it learns from."""

    def __init__(self, *, adapts: bool) -> None:
        self.adapts, self.tokens = adapts, 0

    def learn(self, forecasts: Kept, routing: np.ndarray) -> None:
        assert (len(forecasts), routing.tolist()) == (1, ROUTING.tolist())
        self.tokens += 1


def test_who_adapts_learns_from_tokens_that_are_not_scored_and_nobody_else_does() -> None:
    scores = LiveScores(TOY_SPEC, {})
    scoring = Scoring(scores, share=0.0)
    adapts, stays = Learning(adapts=True), Learning(adapts=False)
    for row, client in enumerate((adapts, stays, adapts)):
        scoring.begin(row, client)
        scoring.keep([row], 0, np.full((1, *SHAPE), 0.5, np.float32))
        if row < 2:
            scoring.finish(row, ROUTING)
        else:
            scoring.forget(row)
    scoring.score_one()
    assert scoring.waits and adapts.tokens == 0
    scoring.learn_from_one()
    assert not scoring.waits
    assert (adapts.tokens, stays.tokens, scores.tokens) == (1, 0, 0)
