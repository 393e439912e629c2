"""Shares a trace out by whole sequences: to train, validate and test; domains held out are in none of these.

load -> split -> one trace for each part; `specmoe traces split` writes them as Parquet shards.

    specmoe traces split recording.npz --out parts --validation 0.1 --test 0.1 --hold-out law
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from traces.errors import TraceError
from traces.trace import RoutingTrace

TRAIN, VALIDATION, TEST, HELD_OUT = "train", "validation", "test", "held-out"
MAX_DOMAINS_NAMED = 20


@dataclass(frozen=True)
class Family:
    """Sequences with the same token ids and the same routing, which stay together.

    sequences: their numbers in the trace. tokens: of all of them. domain: of the first by name.
    """

    digest: str
    sequences: tuple[int, ...]
    tokens: int
    domain: str


def split(
    trace: RoutingTrace, *, validation: float, test: float, hold_out: Collection[str] = (), seed: int = 0
) -> dict[str, RoutingTrace]:
    """The trace's parts by name, each with its sequences in their old order, none in two parts.

    validation, test: shares of the tokens that are not held out, as near as whole sequences allow; train has
    the rest, and each domain is shared out alike. A part whose share is 0 is left out; every other one has a
    sequence at least. hold_out: domains that are in no part but "held-out", identical sequences of other
    domains with them. The same sequences and seed are split alike, in whatever order they come.

    Raises TraceError where a share is out of range, a domain unknown, or sequences are too few.
    """
    shares = _shares(validation, test)
    _check_known(hold_out, Counter(trace.domains))
    held: list[Family] = []
    others: list[Family] = []
    for family in families(trace):
        is_held = any(trace.domains[sequence] in hold_out for sequence in family.sequences)
        (held if is_held else others).append(family)
    parts = _dealt(others, shares, seed) | ({HELD_OUT: held} if held else {})
    return {name: trace.select(_sequences(part)) for name, part in parts.items()}


def families(trace: RoutingTrace) -> list[Family]:
    """All sequences, identical ones together; gates and the order of a layer's experts do not count."""
    alike: dict[str, list[int]] = {}
    for sequence in range(trace.num_sequences):
        alike.setdefault(_digest(trace, trace.sequence(sequence)), []).append(sequence)
    lengths = np.diff(trace.starts)
    return [
        Family(
            digest,
            tuple(sequences),
            tokens=int(lengths[sequences].sum()),
            domain=min(trace.domains[sequence] for sequence in sequences),
        )
        for digest, sequences in alike.items()
    ]


def _digest(trace: RoutingTrace, tokens: slice) -> str:
    content = hashlib.sha256(np.sort(trace.experts[tokens], axis=-1).tobytes())
    if trace.token_ids is not None:
        content.update(trace.token_ids[tokens].tobytes())
    return content.hexdigest()


def _shares(validation: float, test: float) -> dict[str, float]:
    for name, share in ((VALIDATION, validation), (TEST, test)):
        if not (math.isfinite(share) and 0 <= share < 1):
            raise TraceError(
                f"The share of {name} is {share}, expected 0 to less than 1.",
                remedy="0.1 is a tenth of the tokens; 0 leaves the part out.",
            )
    if validation + test >= 1:
        raise TraceError(
            f"The shares of {VALIDATION} and {TEST}, {validation} and {test}, are {validation + test} in all,"
            " expected less than 1.",
            remedy=f"Leave some tokens for {TRAIN}: 0.1 each is usual.",
        )
    shares = {TRAIN: 1 - (validation + test), VALIDATION: validation, TEST: test}
    return {name: share for name, share in shares.items() if share}


def _check_known(hold_out: Collection[str], known: Mapping[str, int]) -> None:
    for domain in hold_out:
        if domain not in known:
            names = sorted(known)
            more = len(names) - MAX_DOMAINS_NAMED
            raise TraceError(
                f"There is no domain {domain!r} to hold out, only {', '.join(names[:MAX_DOMAINS_NAMED])}"
                f"{f' and {more} more' if more > 0 else ''}.",
                remedy="Name one of them; `specmoe traces info` tells what is in each.",
            )


def _dealt(all_families: Sequence[Family], shares: Mapping[str, float], seed: int) -> dict[str, list[Family]]:
    """Each family to the part that lacks most of its share so far, domain after domain, in drawn order.

    So no part strays from its share by much more than the longest family, in a domain or over all of them.
    """
    if len(all_families) < len(shares):
        raise TraceError(
            f"Different sequences to share out: {len(all_families)}, expected {len(shares)} at least,"
            f" one each for {', '.join(shares)}.",
            remedy="Record more, hold fewer domains out, or leave a part out with a share of 0.",
        )
    parts: dict[str, list[Family]] = {name: [] for name in shares}
    total = 0
    dealt = dict.fromkeys(shares, 0)
    for family in sorted(all_families, key=lambda family: (family.domain, _lot(seed, family))):
        total += family.tokens
        lacking = {name: share * total - dealt[name] for name, share in shares.items()}
        neediest = max(lacking, key=lacking.__getitem__)
        parts[neediest].append(family)
        dealt[neediest] += family.tokens
    for name, share in shares.items():
        if not parts[name]:
            _give_one(max(parts.values(), key=len), parts[name], share * total)
    return parts


def _lot(seed: int, family: Family) -> bytes:
    return hashlib.sha256(f"{seed} {family.digest}".encode()).digest()


def _give_one(giver: list[Family], empty: list[Family], tokens: float) -> None:
    """Move the family that comes nearest to so many tokens."""
    nearest = min(giver, key=lambda family: abs(family.tokens - tokens))
    giver.remove(nearest)
    empty.append(nearest)


def _sequences(part: Sequence[Family]) -> list[int]:
    return sorted(sequence for family in part for sequence in family.sequences)
