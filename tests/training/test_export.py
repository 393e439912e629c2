"""From a trained run to a published version: what is served is what was trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from model_store.store import open_store
from specmoe.cli import main
from speculation.runtime import Speculator, State
from speculation.steps import Steps, step_through
from tests.training.toy_routing import SPEC, toy_trace
from tests.training.toy_run import TRAIN, VALIDATION, save_npz
from tests.training.toy_zoo import TOP_ONE
from training.calibration import Calibration
from training.errors import ExportFailed
from training.evaluate import evaluate
from training.export import export, trained
from training.loop import CHECKPOINT
from training.parity import STEPS_TOLERANCE, _check, check_parity, check_trained
from training.predictors.predictor import Predictor
from training.predictors.prefix_graphs import served
from training.run import read_run

KNOBS = {
    "passes": 8,
    "batch-tokens": 32,
    "block-tokens": 8,
    "learning-rate": 0.02,
    "averaging": 0.5,
    "width": 16,
    "hidden": 32,
    "blocks": 1,
    "token-width": 4,
}
GRAPHS = ("predict.onnx", "advance.onnx", "begin.onnx", "step.onnx")
SMALL = [word for name, value in KNOBS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with traces, a run and a store, made by the command line."""
    folder = tmp_path_factory.mktemp("published")
    train = save_npz(TRAIN, folder / "train.npz")
    validation = save_npz(VALIDATION, folder / "validation.npz")
    command = ["train", "--traces", str(train), "--validation", str(validation), "--run", str(folder / "run")]
    publish = ["--publish", "--store", str(folder / "store"), "--alias", "production"]
    assert main([*command, *SMALL, *publish]) == 0
    return folder


@pytest.fixture(scope="module")
def speculator(published: Path) -> Speculator:
    return Speculator(open_store(published / "store").load("toy", 1), provider="cpu")


def test_one_command_publishes_a_version_with_its_lineage(published: Path) -> None:
    store = open_store(published / "store")
    manifest = store.manifest("toy", store.resolve("toy", "production"))
    assert manifest.spec == SPEC
    assert [(s.name, s.use, s.tokens) for s in manifest.lineage.traces] == [
        ("train.npz", "train", 130),
        ("validation.npz", "validation", 50),
    ]
    assert manifest.metrics["validation"]["start"]["recall_at_k"] > 0.3
    assert set(manifest.metrics["validation"]) == {"start", "1", "2", "3"}


def test_it_beats_chance_on_routing_it_never_saw(speculator: Speculator) -> None:
    scores = evaluate(speculator, toy_trace((80, 60), seed=9)).metrics.distances()
    assert scores["start"]["recall_at_k"] > 0.4 > SPEC.top_k / SPEC.num_experts


def test_a_batch_equals_its_rows(speculator: Speculator) -> None:
    assert VALIDATION.token_ids is not None and VALIDATION.gates is not None
    ids, experts, gates = (
        VALIDATION.token_ids[:5].astype(np.int64),
        VALIDATION.experts[:5].astype(np.int32),
        VALIDATION.gates[:5],
    )
    experts[:, 2:] = -1
    together = speculator.predict(speculator.initial_state(5), ids, experts, gates)
    alone = [
        speculator.predict(speculator.initial_state(1), ids[i : i + 1], experts[i : i + 1], gates[i : i + 1])
        for i in range(5)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def after_some_tokens(speculator: Speculator, batch: int) -> State:
    """The state of sequences that began at different tokens of the trace, 12 tokens later."""
    state = speculator.initial_state(batch)
    for token in range(12):
        state = speculator.advance(state, *tokens(token, batch))
    return state


def tokens(first: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, experts, gates) of `batch` tokens, three apart."""
    rows = slice(first, first + 3 * batch, 3)
    assert VALIDATION.token_ids is not None and VALIDATION.gates is not None
    ids, experts = VALIDATION.token_ids[rows].astype(np.int64), VALIDATION.experts[rows].astype(np.int32)
    return ids, experts, VALIDATION.gates[rows].copy()


@pytest.mark.parametrize("at_once", [1, 3, SPEC.num_layers])
@pytest.mark.parametrize("known", [True, False], ids=["token ids", "no token ids"])
def test_steps_come_to_what_predict_says(speculator: Speculator, at_once: int, known: bool) -> None:
    state = after_some_tokens(speculator, 4)
    ids, experts, gates = tokens(12, 4)
    if not known:
        ids.fill(-1)
    for sequence, seen in enumerate((0, 1, 2, 3)):
        experts[sequence, seen:] = -1
    experts[3, 1] = -1  # passed over
    stepped = step_through(Steps(speculator), state, ids, experts, gates, at_once)
    np.testing.assert_allclose(stepped, speculator.predict(state, ids, experts, gates), atol=STEPS_TOLERANCE)


def test_a_batch_of_steps_equals_its_rows(speculator: Speculator) -> None:
    state, token = after_some_tokens(speculator, 4), tokens(12, 4)
    together = step_through(Steps(speculator), state, *token, at_once=1)
    for row in range(4):
        one = slice(row, row + 1)
        alone = step_through(Steps(speculator), [a[one] for a in state], *(a[one] for a in token), at_once=1)
        np.testing.assert_allclose(together[one], alone, atol=1e-5)


def test_with_gates_the_order_of_experts_does_not_matter(speculator: Speculator) -> None:
    states = []
    for order in (slice(None), slice(None, None, -1)):
        state = speculator.initial_state(1)
        for token in range(6):
            ids, experts, gates = tokens(token, 1)
            experts, gates = (np.ascontiguousarray(a[..., order]) for a in (experts, gates))
            state = speculator.advance(state, ids, experts, gates)
        states.append(state)
    for name, ours, theirs in zip(speculator.manifest.state, *states, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3, err_msg=name.name)


def test_weights_of_another_predictor_are_refused(published: Path, tmp_path: Path) -> None:
    shutil.copytree(published / "run", tmp_path / "run")
    run = read_run(tmp_path / "run")
    other = replace(run, predictor_config=replace(run.predictor_config, similar=0))
    with pytest.raises(ExportFailed, match=r"run holds weights of another predictor: .*likeness.*train"):
        trained(other, tmp_path / "run")


def test_a_sequence_carries_only_what_is_needed(speculator: Speculator) -> None:
    steps = Steps(speculator)
    assert [steps.state[place].name for place in steps.step_reads] == [
        "previous",
        "averages",
        "routed",
        "preceding",
    ]
    assert [steps.state[place].name for place in steps.begin_reads] == ["context", "ids", "routed", "past"]
    assert [tensor.name for tensor in steps.progress] == ["seen", "told", "shared"]


def test_a_graph_that_says_something_else_is_not_exported(published: Path) -> None:
    stored = open_store(published / "store").load("toy", 1)
    other, _ = trained(read_run(published / "run"), published / "run")
    with torch.no_grad():
        other.head.bias += 1.0
    with pytest.raises(ExportFailed, match=r"predict at token 0: two answers differ by .*, expected 0\.0001"):
        check_parity(served(other, Calibration(SPEC.num_layers, SPEC.top_k)), stored, VALIDATION)


@pytest.mark.parametrize("value", [0.7, 3.0, -3.0, 40.0])
def test_a_number_in_half_precision_may_be_rounded_either_way_and_no_further(value: float) -> None:
    number = np.array([value], np.float16)
    next_one = np.nextafter(number, np.float16(2 * value))
    _check("it", [next_one], [number])
    further = number + np.float16(3) * (next_one - number)
    with pytest.raises(ExportFailed, match=r"it: two answers differ by .*, expected 0\.001"):
        _check("it", [further], [number])


@pytest.mark.parametrize("known", [True, False])
def test_a_version_that_says_something_else_than_was_trained_is_not_exported(
    published: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(predictor: Predictor, calibration: Calibration, *rest: Any) -> None:
        first = known * (SPEC.num_layers + 1)
        calibration.bias[first : first + SPEC.num_layers] += 0.2
        check_trained(predictor, calibration, *rest)

    monkeypatch.setattr("training.export.check_trained", shifted)
    whose = "With" if known else "Without"
    with pytest.raises(
        ExportFailed, match=rf"{whose} token ids, what is served differs from what was trained"
    ):
        export(published / "run")


def test_it_works_without_token_ids_and_gates(speculator: Speculator) -> None:
    bare = toy_trace((80, 60), seed=9, gates=False, token_ids=False)
    assert evaluate(speculator, bare).metrics.distances()["1"]["recall_at_k"] > SPEC.top_k / SPEC.num_experts


def test_nothing_of_the_machine_is_in_the_graphs(published: Path) -> None:
    for name in GRAPHS:
        content = (published / "store" / "toy" / "1" / name).read_bytes()
        assert b"/" + b"training/" not in content and str(Path.cwd()).encode() not in content
        graph = onnx.load_model_from_string(content)
        assert not graph.metadata_props and all(not node.metadata_props for node in graph.graph.node)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_batch_axis_is_free(published: Path, name: str) -> None:
    graph = onnx.load(published / "store" / "toy" / "1" / name)
    assert {tensor.type.tensor_type.shape.dim[0].dim_param for tensor in graph.graph.input} == {"batch"}


def test_exporting_again_gives_the_same_graphs(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(published / "run")]) == 0
    assert "specmoe publish" in capsys.readouterr().out
    for name in GRAPHS:
        first = (published / "store" / "toy" / "1" / name).read_bytes()
        assert (published / "run" / "export" / name).read_bytes() == first


def test_resuming_a_finished_run_publishes_the_next_version(published: Path, tmp_path: Path) -> None:
    shutil.copytree(published / "run", tmp_path / "run")
    files = ["--traces", str(published / "train.npz"), "--validation", str(published / "validation.npz")]
    publish = ["--publish", "--store", str(published / "store")]
    assert main(["train", *files, "--run", str(tmp_path / "run"), "--resume", *SMALL, *publish]) == 0
    assert open_store(published / "store").versions("toy") == [1, 2]


def test_traces_without_token_ids_make_a_version_without_repeats(tmp_path: Path) -> None:
    """And a router that picks one expert makes one as any other."""
    train, validation = (
        save_npz(toy_trace((60, 40), spec=TOP_ONE, seed=seed, token_ids=False), tmp_path / f"{seed}.npz")
        for seed in (1, 2)
    )
    files = ["--traces", str(train), "--validation", str(validation), "--run", str(tmp_path / "run")]
    publish = ["--publish", "--store", str(tmp_path / "store")]
    assert main(["train", *files, *SMALL, *publish]) == 0
    manifest = open_store(tmp_path / "store").manifest("toy", 1)
    scores = manifest.metrics["validation"]["1"]
    assert manifest.spec.top_k == 1 and scores["hit_at_1"] == scores["recall_at_k"] > 1.2 / 8
    window = ["routed", "past", "preceding"]  # similar tokens are looked for in it
    assert [tensor.name for tensor in manifest.state] == ["context", "previous", "averages", *window]
    assert [tensor.name for tensor in manifest.token] == ["start", "alike"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "holds no run"),
        (lambda run: (run / "run.json").write_text("{"), "run.json: the file: Invalid JSON"),
        (
            lambda run: (run / "run.json").write_text(
                (run / "run.json").read_text().replace('"prefix"', '"oracle"')
            ),
            "predictor is 'oracle', expected one of prefix, interlayer",
        ),
        (lambda run: (run / CHECKPOINT).unlink(), "does not exist"),
        (lambda run: (run / CHECKPOINT).write_bytes(b"damaged"), "is damaged"),
    ],
    ids=["no record", "damaged record", "unknown predictor", "no checkpoint", "damaged checkpoint"],
)
def test_a_folder_that_is_no_run_is_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, message: str
) -> None:
    assert callable(change)
    shutil.copytree(published / "run", tmp_path / "run")
    change(tmp_path / "run")
    assert main(["export", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--publish"], "--publish has no --store"),
        (["--store", "store"], "--store and --alias are given without --publish"),
        (["--alias", "production"], "--store and --alias are given without --publish"),
        (["--publish", "--store", "s3://x/y"], "'s3://x/y' is no location on S3"),
        (["--publish", "--store", "store", "--alias", "5"], "'5' cannot be an alias"),
        (["--passes", "0"], "passes is 0, expected at least 1"),
        ([], "already holds a run"),
    ],
    ids=["no store", "store alone", "alias alone", "bad store", "bad alias", "bad knob", "run exists"],
)
def test_train_says_what_is_wrong(
    published: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    files = ["--traces", str(published / "train.npz"), "--validation", str(published / "validation.npz")]
    assert main(["train", *files, "--run", str(published / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_resuming_with_other_knobs_is_refused(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--traces", str(published / "train.npz"), "--validation", str(published / "validation.npz")]
    assert main(["train", *files, "--run", str(published / "run"), "--resume", *SMALL, "--seed", "7"]) == 2
    assert "was started with other train config: seed 0, now 7. Resume" in capsys.readouterr().err


def test_validation_traces_of_another_shape_are_refused(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_npz(toy_trace(spec=type(SPEC)("other", 5, 8, 2)), tmp_path / "other.npz")
    files = ["--traces", str(published / "train.npz"), "--validation", str(other)]
    assert main(["train", *files, "--run", str(tmp_path / "run"), *SMALL]) == 2
    message = "The trace of other has num_layers 5, expected 4 as in the training traces."
    assert message in capsys.readouterr().err


def test_training_traces_do_not_validate_under_another_name_either(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.npz"
    again.write_bytes((published / "train.npz").read_bytes())
    files = ["--traces", str(published / "train.npz"), "--validation", str(again)]
    assert main(["train", *files, "--run", str(tmp_path / "run"), *SMALL]) == 2
    message = "again.npz is given for validation, and the same recording, as train.npz, for training."
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_record_tells_the_knobs(published: Path) -> None:
    record = json.loads((published / "run" / "run.json").read_text())
    assert record["train_config"]["passes"] == 8 and record["predictor_config"]["width"] == 16
