"""Other model servers: what they are asked, who is skipped, and what is made of the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_store.store import open_store
from specmoe.bench.aims import Aim
from specmoe.bench.contenders import Contender
from specmoe.bench.cores import Cores
from specmoe.bench.latency import Latency
from specmoe.bench.other_servers import SERVERS, WRAPPERS, lists, open_inference, python_of, rows
from specmoe.bench.parts import QUICK
from specmoe.bench.report_streams import memory_lines, server_lines
from specmoe.bench.routing import made_up
from specmoe.bench.servers import ServerComparison
from tests.toy_version import TOY_SPEC, toy_store

ROUTING = made_up(TOY_SPEC, batch=2, seen=2, seed=0)


def sent(body: dict[str, Any]) -> dict[str, Any]:
    """As it arrives."""
    return json.loads(json.dumps(body))


def test_lists_hold_the_arrays() -> None:
    body = sent(lists(ROUTING))
    np.testing.assert_array_equal(body["experts"], ROUTING.experts)
    np.testing.assert_array_equal(body["token_id"], ROUTING.token_ids)
    np.testing.assert_array_equal(np.asarray(body["gates"], np.float32), ROUTING.gates)


def test_rows_are_the_same_by_sequence() -> None:
    body = sent(rows(ROUTING))["rows"]
    assert [row["token_id"] for row in body] == ROUTING.token_ids.tolist()
    assert [row["experts"] for row in body] == ROUTING.experts.tolist()


def test_the_open_inference_protocol_says_type_and_shape() -> None:
    tensors = {tensor["name"]: tensor for tensor in sent(open_inference(ROUTING))["inputs"]}
    assert {name: tensor["datatype"] for name, tensor in tensors.items()} == {
        "token_id": "INT64",
        "experts": "INT32",
        "gates": "FP32",
    }
    np.testing.assert_array_equal(
        np.reshape(tensors["experts"]["data"], tensors["experts"]["shape"]), ROUTING.experts
    )


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_every_server_can_be_installed(server: Any) -> None:
    assert (WRAPPERS / server.name / "model.py").exists()
    pins = (WRAPPERS / server.name / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in pins if not line.startswith("#"))
    assert any(line.startswith(f"{server.name}==") for line in pins)
    assert f"onnxruntime=={_ours('onnxruntime')}" in pins


def test_what_is_not_installed_is_skipped_and_said(tmp_path: Path) -> None:
    store = toy_store(tmp_path)
    stored = open_store(str(store)).load("toy", 1)
    comparison = ServerComparison(stored, ["--store", str(store)], Cores(None, None), tmp_path)
    assert comparison.report() == {}
    assert len(list(comparison.run(QUICK))) == comparison.steps(QUICK)
    report = comparison.report()
    assert [row["server"] for row in report["rows"]] == ["specMoE, REST", "specMoE, stream"]
    assert report["aims"] == []
    text = "\n".join(server_lines(report))
    assert all(f"- {server.name}: not installed: `make bench-servers`" in text for server in SERVERS)
    assert python_of(SERVERS[0], tmp_path) is None


def test_what_is_added_is_above_the_model_call() -> None:
    model, times = Latency(), {1: Latency(), 16: Latency()}
    model.add([100.0], 1.0)
    times[1].add([350.0], 1.0)
    times[16].add([900.0, 900.0], 0.5)
    report = Contender("other", lambda *_: ([], 0.0), times=times).report(model)
    assert report["added_us"] == 250.0
    assert report["connections_16"]["per_second"] == 4.0


@pytest.mark.parametrize(
    ("aim", "measured", "met"),
    [
        (Aim("p50", 200, "µs"), 200.0, True),
        (Aim("p50", 200, "µs"), 200.1, False),
        (Aim("throughput", 2, "×", at_least=True), 2.0, True),
        (Aim("throughput", 2, "×", at_least=True), 1.99, False),
    ],
)
def test_an_aim_is_met_up_to_its_limit(aim: Aim, measured: float, met: bool) -> None:
    assert aim.report(measured)["met"] is met


def test_an_aim_that_is_missed_is_told_so() -> None:
    report = {"sequences": 10, "before_mb": 100, "after_mb": 600, "kilobytes_a_sequence": 50_000.0}
    text = "\n".join(memory_lines({**report, "aims": [Aim("memory", 500, "MB").report(600)]}))
    assert "| memory |   600 MB | ≤ 500 MB | missed |" in text


def _ours(package: str) -> str:
    lines = (WRAPPERS.parents[1] / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
