"""Whatever happens to a dump on its way, its importer reads it or refuses it, and never fails otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import FIXTURES
from traces.errors import TraceError
from traces.importers.formats import FORMATS
from traces.importers.told import Told

TOLD = Told("toy", num_experts=4, num_layers=3, top_k=2)
FIXTURE_OF = {
    "vllm": "vllm.jsonl",
    "sglang": "sglang.jsonl",
    "sglang-recorder": "sglang_recorder.pt",
    "moe-trace": "moe_trace.csv",
    "fingerprint": "fingerprint.json",
    "router-trace": "router_trace.jsonl",
    "esft": "esft/expert_weights_1.txt",
}
OFTEN = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON_FORMATS = [name for name, fixture in FIXTURE_OF.items() if ".json" in fixture]


def read_or_refuse(path: Path, name: str) -> None:
    try:
        trace = FORMATS[name].read(path.parent if name == "esft" else path, TOLD).trace
    except TraceError as refusal:
        assert str(path.parent) in refusal.message
        assert refusal.remedy
    else:
        assert trace.num_tokens > 0


def placed(folder: Path, name: str) -> Path:
    """A copy of the fixture, beside the files that belong to it."""
    source = FIXTURES / FIXTURE_OF[name]
    if name == "esft":
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
    return folder / source.name


def test_every_format_but_those_tested_elsewhere_is_tested_here() -> None:
    assert set(FORMATS) - set(FIXTURE_OF) == {"npz", "route-trace"}


@pytest.mark.parametrize("name", FIXTURE_OF)
@OFTEN
@given(data=st.data())
def test_changed_bytes(tmp_path: Path, name: str, data: st.DataObject) -> None:
    whole = (FIXTURES / FIXTURE_OF[name]).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(len(whole), start + 40)))
    put = data.draw(st.binary(max_size=20) | st.sampled_from([b"", b"9" * 20, b"-1", b"null", b"[[", b"\t"]))
    path = placed(tmp_path, name)
    path.write_bytes(whole[:start] + put + whole[stop:])
    read_or_refuse(path, name)


KEYS = st.sampled_from(["routed_experts", "layer_0", "x"])
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["AAAA", 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, item in inner for found in places(item, (*way, key)))]


def changed(value: Any, way: tuple[Any, ...], put: Any) -> Any:
    if not way:
        return put
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[way[0]] = changed(value[way[0]], way[1:], put)
    return copied


@pytest.mark.parametrize("name", JSON_FORMATS)
@OFTEN
@given(data=st.data())
def test_json_with_something_else_in_one_place(tmp_path: Path, name: str, data: st.DataObject) -> None:
    fixture = FIXTURES / FIXTURE_OF[name]
    text = fixture.read_text()
    documents = (
        [json.loads(line) for line in text.splitlines()] if fixture.suffix == ".jsonl" else [json.loads(text)]
    )
    documents = changed(documents, data.draw(st.sampled_from(places(documents)[1:])), data.draw(ANYTHING))
    path = tmp_path / fixture.name
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    read_or_refuse(path, name)
