"""Splits of a comparison: apart, of one shape, and shuffled or cut without anything else changed."""

from pathlib import Path

import numpy as np
import pytest

from tests.training.toy_hidden import save_shards, with_hidden
from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_run import TRAIN, VALIDATION, save_npz
from traces.files import load
from traces.spec import RoutingSpec
from training.baselines import popularity
from training.compare_traces import first_sequences, read_splits, shuffled
from training.errors import ComparisonInvalid, SpecMismatch

OTHER = RoutingSpec(model="toy", num_layers=4, num_experts=16, top_k=2)


def files(folder: Path) -> list[Path]:
    traces = {"train": TRAIN, "validation": VALIDATION, "test": toy_trace(seed=5)}
    return [save_npz(trace, folder / f"{name}.npz") for name, trace in traces.items()]


def test_shuffling_keeps_popularity_and_nothing_else() -> None:
    dealt = shuffled(TRAIN, seed=0)
    np.testing.assert_array_equal(popularity(dealt), popularity(TRAIN))
    assert (dealt.experts != TRAIN.experts).any(axis=(1, 2)).mean() > 0.9
    again = [(trace.experts[1:] == trace.experts[:-1]).all(-1).mean() for trace in (TRAIN, dealt)]
    assert again[1] < again[0] / 2


def test_gates_go_along_with_their_experts() -> None:
    dealt = shuffled(TRAIN, seed=0)
    assert dealt.gates is not None and TRAIN.gates is not None

    def pairs(experts: np.ndarray, gates: np.ndarray) -> set[tuple[float, ...]]:
        return {tuple(row) for row in np.concatenate([experts[:, 2], gates[:, 2]], axis=-1).tolist()}

    assert pairs(dealt.experts, dealt.gates) == pairs(TRAIN.experts, TRAIN.gates)


def test_first_sequences_are_whole_and_enough() -> None:
    assert first_sequences(TRAIN, 61).starts.tolist() == [0, 60, 100]
    assert first_sequences(TRAIN, 10**6).num_tokens == TRAIN.num_tokens


def test_what_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    train, validation, test = files(tmp_path)
    control = read_splits((train,), (validation,), test).shuffled(tmp_path / "made")
    read = load(control.train.paths[0])
    np.testing.assert_array_equal(read.experts, control.train.trace.experts)
    assert (read.spec, read.domains) == (SPEC, TRAIN.domains)


def test_hidden_states_are_cut_with_their_tokens_and_left_out_of_the_control(tmp_path: Path) -> None:
    paths = [
        save_shards(with_hidden(trace), tmp_path / name)
        for name, trace in (("train", TRAIN), ("validation", VALIDATION), ("test", toy_trace(seed=5)))
    ]
    splits = read_splits((paths[0],), (paths[1],), paths[2])
    assert splits.hidden and not splits.shuffled(tmp_path / "made").hidden
    cut = splits.cut(tmp_path / "made")
    (path,) = cut.validation.paths
    whole, read = splits.validation.trace.hidden, load(path, hidden=True).hidden
    assert whole is not None and read is not None
    np.testing.assert_array_equal(read.states, whole.states[: len(read.states)])
    np.testing.assert_array_equal(read.routers, whole.routers)


def test_a_file_in_two_splits_is_refused(tmp_path: Path) -> None:
    train, validation, _ = files(tmp_path)
    with pytest.raises(ComparisonInvalid, match=r"train.npz is given for test, and the same file for train"):
        read_splits((train,), (validation,), train)


@pytest.mark.parametrize("which", ["validation", "test"])
def test_traces_of_another_shape_are_refused(tmp_path: Path, which: str) -> None:
    train, validation, test = files(tmp_path)
    other = save_npz(toy_trace(spec=OTHER), tmp_path / "other.npz")
    with pytest.raises(SpecMismatch, match="num_experts 16"):
        read_splits(
            (train,), (other if which == "validation" else validation,), other if which == "test" else test
        )
