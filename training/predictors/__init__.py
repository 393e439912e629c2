"""The predictors that can be trained by name: torch modules that take themselves apart into two graphs."""

from __future__ import annotations

from training.predictors.prefix import PrefixPredictor

PREDICTORS = {PrefixPredictor.name: PrefixPredictor}
