"""The list of approaches: complete, and each with the knobs it is named after."""

import pytest

from training.approaches import APPROACHES, CONTROL, chosen
from training.baselines import BASELINES
from training.errors import ConfigInvalid
from training.presets import PRESETS


def test_every_predictor_and_every_baseline_is_compared() -> None:
    assert set(PRESETS) <= set(APPROACHES)
    assert {approach.baseline for approach in APPROACHES.values()} >= set(BASELINES)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_trained_as_it_is_by_name(name: str) -> None:
    how = APPROACHES[name].training(0, passes=None, precision=None, quick=False)
    assert (APPROACHES[name].config(quick=False), how) == (PRESETS[name].config, PRESETS[name].train)


def test_an_augmentation_changes_its_own_knob_alone() -> None:
    plain, noisy = (
        vars(APPROACHES[n].training(0, passes=3, precision="bfloat16", quick=False))
        for n in ("prefix", "prefix+noise")
    )
    assert {name for name in plain if plain[name] != noisy[name]} == {"noise"}
    assert plain["passes"] == 3 and plain["precision"] == "bfloat16"


@pytest.mark.parametrize("name", [name for name, a in APPROACHES.items() if a.predictor])
def test_a_quick_one_is_small(name: str) -> None:
    assert APPROACHES[name].training(0, passes=None, precision=None, quick=True).passes == 1
    has_no_size = APPROACHES[name].predictor in ("next-gate", "hidden-linear")
    assert (APPROACHES[name].config(quick=True) == APPROACHES[name].config(quick=False)) == has_no_size


def test_names_are_taken_in_the_order_of_the_list() -> None:
    some = chosen(["prefix", CONTROL, "random"], hidden=False)
    assert [a.name for a in some] == ["random", "prefix", CONTROL]
    assert [a.name for a in chosen([], hidden=True)] == list(APPROACHES)


def test_without_hidden_states_those_that_read_them_are_left_out_unless_named() -> None:
    left_out = {"next-gate", "hidden-linear", "hidden-mlp", "prefix-hidden"}
    assert {a.name for a in chosen([], hidden=False)} == set(APPROACHES) - left_out
    assert [a.name for a in chosen(["hidden-mlp"], hidden=False)] == ["hidden-mlp"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"'prefx' is no approach, expected some of random, .*prefix"):
        chosen(["prefix", "prefx"], hidden=False)
