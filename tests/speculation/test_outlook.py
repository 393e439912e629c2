"""Which experts later tokens will use: told from the state, checked like any other graph."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from model_store.manifest import OUTLOOK
from speculation.errors import GoldenMismatch, GraphRefused, InputInvalid, OutlookUnknown
from speculation.golden import check_golden, golden_inputs
from speculation.runtime import Speculator
from tests.toy_version import TOY_SPEC, toy_stored, with_graphs

STORED = toy_stored(outlook=True)
SHAPE = (TOY_SPEC.num_layers, TOY_SPEC.num_experts)


@pytest.fixture(scope="module")
def speculator() -> Speculator:
    return Speculator(STORED, provider="cpu")


def test_it_changes_with_what_was_routed(speculator: Speculator) -> None:
    token_ids, experts, gates = golden_inputs(TOY_SPEC)
    state = speculator.initial_state(4)
    before = speculator.outlook(state)
    after = speculator.outlook(speculator.advance(state, token_ids, experts, gates))
    assert before.shape == after.shape == (4, *SHAPE)
    assert (before == 0.5).all()
    routed = np.zeros((4, *SHAPE), bool)
    np.put_along_axis(routed, experts.astype(np.int64), True, axis=-1)
    assert ((after > 0.5) == routed).all()


def test_the_published_outlook_is_what_it_tells(speculator: Speculator) -> None:
    check_golden(speculator)


def test_another_outlook_than_the_published_one_is_refused() -> None:
    # With a golden answer given, the toy does not work out that of its outlook, which stays 0.
    stored = toy_stored(outlook=True, golden=STORED.manifest.golden)
    with pytest.raises(GoldenMismatch, match=r"toy/1 expects 0\..* promises 0\.0000"):
        check_golden(Speculator(stored, provider="cpu"))


def test_a_graph_of_another_signature_is_refused() -> None:
    model = onnx.load_from_string(STORED.graphs[OUTLOOK])
    model.graph.input.append(helper.make_tensor_value_info("token_id", TensorProto.INT64, ["B"]))
    with pytest.raises(GraphRefused, match=r"toy/1/outlook\.onnx has the inputs average, token_id"):
        Speculator(with_graphs(STORED, {OUTLOOK: model.SerializeToString()}), provider="cpu")


def test_a_version_without_one_says_so() -> None:
    speculator = Speculator(toy_stored(), provider="cpu")
    with pytest.raises(OutlookUnknown, match=r"toy/1 has no outlook\.onnx"):
        speculator.outlook(speculator.initial_state(1))


def test_what_is_no_state_is_refused(speculator: Speculator) -> None:
    state = speculator.initial_state(2)
    with pytest.raises(InputInvalid, match="state has 1 arrays, expected 2"):
        speculator.outlook(state[:1])
    with pytest.raises(InputInvalid, match="state last_token is"):
        speculator.outlook((state[0], state[1][:1]))
    with pytest.raises(InputInvalid, match="state has 0 arrays"):
        speculator.outlook(())
