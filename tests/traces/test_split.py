"""Splits: whole sequences, each in one part, identical ones together, shares as near as may be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.traces.made_up import made_up_trace, same, traces
from traces.errors import TraceError
from traces.split import HELD_OUT, TEST, TRAIN, VALIDATION, families, split
from traces.trace import RoutingTrace, concatenate

SHARES = st.floats(0, 0.45)


def sequences(trace: RoutingTrace) -> Counter[tuple[bytes, ...]]:
    """How often each sequence is there, bit by bit."""
    return Counter(
        (
            trace.domains[index].encode(),
            trace.experts[rows].tobytes(),
            b"" if trace.gates is None else trace.gates[rows].tobytes(),
            b"" if trace.token_ids is None else trace.token_ids[rows].tobytes(),
            b"" if trace.prefill is None else trace.prefill[rows].tobytes(),
        )
        for index, rows in ((index, trace.sequence(index)) for index in range(trace.num_sequences))
    )


def contents(trace: RoutingTrace) -> set[tuple[bytes, bytes]]:
    """What makes sequences identical: their token ids and routing."""
    return {
        (
            np.sort(trace.experts[rows]).tobytes(),
            b"" if trace.token_ids is None else trace.token_ids[rows].tobytes(),
        )
        for rows in map(trace.sequence, range(trace.num_sequences))
    }


@st.composite
def recordings(draw: st.DrawFn) -> RoutingTrace:
    """Traces some of whose sequences are there twice or more, now and then in another domain."""
    trace = draw(traces())
    again = draw(st.lists(st.integers(0, trace.num_sequences - 1), max_size=6))
    repeated = trace.select([*range(trace.num_sequences), *again])
    names = st.sampled_from(["chat", "code", "law"])
    domains = draw(st.lists(names, min_size=repeated.num_sequences, max_size=repeated.num_sequences))
    return replace(repeated, domains=tuple(domains))


@given(recordings(), SHARES, SHARES, st.sets(st.sampled_from(["chat", "law"])), st.integers(0, 99))
def test_every_sequence_is_in_one_part_unchanged_with_those_like_it(
    trace: RoutingTrace, validation: float, test: float, hold_out: set[str], seed: int
) -> None:
    hold_out &= set(trace.domains)
    held = {
        tuple(of.sequences) for of in families(trace) if hold_out & {trace.domains[i] for i in of.sequences}
    }
    asked = 1 + bool(validation) + bool(test)
    if len(families(trace)) - len(held) < asked:
        with pytest.raises(TraceError, match=f"expected {asked} at least"):
            split(trace, validation=validation, test=test, hold_out=hold_out, seed=seed)
        return
    parts = split(trace, validation=validation, test=test, hold_out=hold_out, seed=seed)
    assert sum((sequences(part) for part in parts.values()), Counter()) == sequences(trace)
    assert sum(len(contents(part)) for part in parts.values()) == len(contents(trace))
    assert set(parts) == {
        TRAIN,
        *([VALIDATION] if validation else []),
        *([TEST] if test else []),
        *([HELD_OUT] if hold_out else []),
    }
    assert not hold_out & {domain for name in {*parts} - {HELD_OUT} for domain in parts[name].domains}


@given(
    st.lists(st.integers(1, 40), min_size=30, max_size=60),
    SHARES,
    SHARES,
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_shares_of_tokens_are_as_asked_but_for_the_longest_sequences(
    lengths: list[int], validation: float, test: float, domains: int, seed: int
) -> None:
    trace = made_up_trace(lengths=lengths, seed=seed)
    trace = replace(trace, domains=tuple(f"domain {index % domains}" for index in range(len(lengths))))
    parts = split(trace, validation=validation, test=test, seed=seed)
    for name, share in ((VALIDATION, validation), (TEST, test)):
        tokens = parts[name].num_tokens if name in parts else 0
        assert abs(tokens - share * trace.num_tokens) <= 2 * max(lengths)


def test_each_domain_is_shared_out_alike() -> None:
    trace = replace(
        made_up_trace(lengths=(5,) * 120), domains=("chat",) * 60 + ("code",) * 40 + ("law",) * 20
    )
    parts = split(trace, validation=0.1, test=0.2)
    for name, share in ((TRAIN, 0.7), (VALIDATION, 0.1), (TEST, 0.2)):
        domains = Counter(parts[name].domains)
        for domain, count in Counter(trace.domains).items():
            assert abs(domains[domain] - share * count) <= 2


def test_many_domains_of_one_sequence_each_reach_every_part() -> None:
    trace = replace(made_up_trace(lengths=(5,) * 50), domains=tuple(f"domain {n}" for n in range(50)))
    parts = split(trace, validation=0.1, test=0.1)
    assert {name: part.num_sequences for name, part in parts.items()} == {TRAIN: 40, VALIDATION: 5, TEST: 5}


@given(recordings(), st.randoms(use_true_random=False))
def test_a_split_follows_from_seed_and_sequences_alone(trace: RoutingTrace, random: Random) -> None:
    assume(len(families(trace)) >= 3)
    order = list(range(trace.num_sequences))
    random.shuffle(order)
    one, other = (split(t, validation=0.2, test=0.2, seed=3) for t in (trace, trace.select(order)))
    assert {name: sequences(part) for name, part in one.items()} == {
        name: sequences(part) for name, part in other.items()
    }


def test_the_same_seed_gives_the_same_split_and_another_another() -> None:
    trace = made_up_trace(lengths=(3, 5, 4, 6) * 10)
    first, again, other = (split(trace, validation=0.2, test=0.2, seed=seed) for seed in (1, 1, 2))
    assert all(same(first[name], again[name]) for name in first)
    assert contents(first[TEST]) != contents(other[TEST])


def test_sequences_keep_their_order() -> None:
    trace = replace(made_up_trace(lengths=(1,) * 40), token_ids=np.arange(40, dtype=np.int32))
    for part in split(trace, validation=0.2, test=0.2).values():
        assert part.token_ids is not None and (np.diff(part.token_ids) > 0).all()


def test_the_order_of_a_layers_experts_makes_no_other_sequence() -> None:
    trace = made_up_trace(lengths=(4, 3, 5))
    mirrored = replace(trace, experts=trace.experts[..., ::-1].copy())
    assert [family.sequences for family in families(concatenate([trace, mirrored]))] == [
        (0, 3),
        (1, 4),
        (2, 5),
    ]


def test_as_few_sequences_as_parts_give_each_one() -> None:
    parts = split(made_up_trace(lengths=(9, 1, 2)), validation=0.1, test=0.1)
    assert {name: part.num_tokens for name, part in parts.items()} == {TRAIN: 9, VALIDATION: 1, TEST: 2}


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (0.5, 0.5, "0.5 and 0.5, are 1.0 in all, expected less than 1"),
        (1.0, 0.0, "share of validation is 1.0"),
        (0.1, -0.1, "share of test is -0.1"),
        (float("nan"), 0.1, "share of validation is nan"),
    ],
)
def test_shares_that_leave_nothing_to_train_on_are_refused(
    validation: float, test: float, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        split(made_up_trace(), validation=validation, test=test)


def test_an_unknown_domain_is_refused_with_a_list_of_those_there_are() -> None:
    trace = replace(made_up_trace(lengths=(1,) * 22), domains=tuple(f"domain {n:02}" for n in range(22)))
    with pytest.raises(TraceError, match=r"'lw' to hold out, only domain 00, .*domain 19 and 2 more"):
        split(trace, validation=0.1, test=0.1, hold_out=["domain 01", "lw"])


def test_holding_everything_out_leaves_too_few() -> None:
    with pytest.raises(TraceError, match="share out: 0, expected 1 at least, one each for train"):
        split(made_up_trace(), validation=0, test=0, hold_out=["domain 0", "domain 1"])
