"""`specmoe train`: knobs of the chosen predictor, with its own defaults, and of no other."""

import argparse

import pytest

from specmoe.commands import train as command
from training import pipeline
from training.config import TrainConfig
from training.errors import ConfigInvalid
from training.predictor_configs import EnsembleConfig, InterlayerConfig
from training.presets import PRESETS

FILES = ["--traces", "a.npz", "--validation", "b.npz", "--run", "runs/a"]


def asked_for(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, object]:
    """What `specmoe train` asks the pipeline for."""
    given: dict[str, object] = {}
    monkeypatch.setattr(pipeline, "train", lambda **options: given.update(options))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([*FILES, *words])) == 0
    return given


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_stands_for_its_preset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given = asked_for(monkeypatch, "--predictor", name)
    assert given["predictor"] == name
    assert (given["predictor_config"], given["train_config"]) == (PRESETS[name].config, PRESETS[name].train)


def test_without_a_name_it_is_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_for(monkeypatch)["train_config"] == PRESETS["prefix"].train


def test_knobs_change_the_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    given = asked_for(
        monkeypatch,
        "--predictor",
        "interlayer-enhanced",
        "--width",
        "64",
        "--restarts",
        "1",
        "--mixup",
        "0.2",
    )
    config, how = given["predictor_config"], given["train_config"]
    assert isinstance(config, InterlayerConfig) and isinstance(how, TrainConfig)
    assert (config.width, config.heads) == (64, 16)
    assert (how.restarts, how.mixup, how.learning_rate) == (1, 0.2, 5e-4)


def test_members_of_an_ensemble_have_knobs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--predictor", "ensemble", "--prefix-width", "32", "--multiscale-contexts", "1", "2"]
    config = asked_for(monkeypatch, *words)["predictor_config"]
    assert isinstance(config, EnsembleConfig)
    assert (config.prefix.width, config.multiscale.contexts, config.interlayer.width) == (32, (1, 2), 256)


@pytest.mark.parametrize(
    ("predictor", "words"),
    [
        ("interlayer", ["--decays", "0", "0.5"]),
        ("prefix", ["--memory", "4"]),
        ("ensemble", ["--width", "32"]),
    ],
)
def test_a_knob_of_another_predictor_is_refused(
    monkeypatch: pytest.MonkeyPatch, predictor: str, words: list[str]
) -> None:
    with pytest.raises(ConfigInvalid, match=f"{words[0]} is given, but {predictor} has no such knob"):
        asked_for(monkeypatch, "--predictor", predictor, *words)


def test_help_tells_each_predictors_default() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    told = "".join(parser.format_help().split())
    assert "multiscale:192." in told and "interlayer-extended:320." in told
