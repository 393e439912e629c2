"""Which tokens are scored waits for a quiet moment, but not for ever."""

from __future__ import annotations

import numpy as np

from service.stream.scoring import MOST_TOKENS, Scoring
from speculation.live import LiveScores
from tests.toy_version import TOY_SPEC

SHAPE = (TOY_SPEC.num_layers, TOY_SPEC.num_experts)
ROUTING = np.tile(np.arange(TOY_SPEC.top_k), (TOY_SPEC.num_layers, 1))


def test_a_backlog_presses_until_some_of_it_is_scored() -> None:
    scores = LiveScores(TOY_SPEC, {})
    scoring = Scoring(scores, share=1.0)
    for row in range(MOST_TOKENS // 2):
        assert not scoring.presses
        scoring.begin(row)
        scoring.keep([row], 0, np.full((1, *SHAPE), 0.5, np.float32))
        scoring.finish(row, ROUTING)
    assert scoring.presses
    scoring.score_one()
    assert not scoring.presses
    assert scores.tokens == 1
