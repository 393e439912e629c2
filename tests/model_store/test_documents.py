"""manifest.json and aliases.json: a round trip, and every field that is not what it must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.documents import complete, read_aliases, read_draft, read_manifest, written
from model_store.errors import ManifestInvalid
from model_store.manifest import ADVANCE, PREDICT, Draft, Manifest
from tests.toy_version import toy_version

ORIGIN = "store/toy/1/manifest.json"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return complete(toy_version()[0], 1, {PREDICT: b"predict", ADVANCE: b"advance"})


@pytest.fixture(scope="module")
def fields(manifest) -> dict[str, Any]:
    return json.loads(written(manifest))


def test_a_manifest_is_read_as_it_was_written(manifest):
    assert read_manifest(written(manifest), model="toy", version=1, origin=ORIGIN) == manifest


def test_a_draft_is_read_as_it_was_written():
    draft = toy_version()[0]
    assert read_draft(written(draft), origin="draft.json") == draft


def test_a_document_has_one_field_a_line(manifest):
    fields = set(Manifest.model_fields) - {"outlook", "hidden_size"}  # of which it has none
    assert len(written(manifest).splitlines()) == len(fields) + 2


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True), st.integers(1, 999_999_999)))
def test_aliases_are_read_as_they_were_written(aliases):
    assert read_aliases(written(aliases), origin="aliases.json") == aliases


SPEC = {"model": "toy", "num_layers": 4, "num_experts": 8, "top_k": 2}
STATE = {"name": "average", "dtype": "float32", "shape": [4, 8]}
# One expert, for every layer and distance.
FIRST_ONE = [[[1] * (layer + 1) for layer in range(4)]]
TENSOR = {"name": "told", "dtype": "float32", "shape": [3]}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1, came 2"),
        ({"version": "1"}, "version: Input should be a valid integer, came '1'"),
        ({"version": 0}, "version: Input should be greater than or equal to 1, came 0"),
        ({"version": 2}, "is of toy version 2, but lies where toy version 1 belongs"),
        ({"note": "hello"}, "note: Extra inputs are not permitted, came 'hello'"),
        ({"spec": SPEC | {"top_k": 9}}, "spec: top_k is 9, expected 1 to 8"),
        ({"spec": SPEC | {"model": "../toy"}}, "spec: Model name '../toy' is not usable"),
        ({"spec": SPEC | {"heads": 3}}, "spec.heads: Unexpected keyword argument, came 3"),
        ({"spec": SPEC | {"model": "other"}}, "is of other version 1, but lies where toy version 1 belongs"),
        ({"spec": SPEC | {"num_layers": 5}}, "golden must be 5 x 8, as the spec says"),
        ({"state": [STATE, STATE]}, "two inputs have the name average"),
        ({"state": [STATE | {"name": "gates"}]}, "two inputs have the name gates"),
        ({"state": [STATE | {"name": "../x"}]}, r"state.0.name: String should match pattern .*, came '../x'"),
        (
            {"state": [STATE | {"dtype": "object"}]},
            "state.0.dtype: Input should be 'float16', 'float32', 'int32', 'int64' or 'uint8'",
        ),
        ({"state": [STATE | {"shape": [1 << 12, 1 << 12]}]}, "16777216 elements, expected 4194304 at most"),
        ({"token": [STATE], "progress": [STATE]}, "two inputs have the name average"),
        ({"token": [TENSOR | {"name": "layers"}], "progress": [TENSOR]}, "two inputs have the name layers"),
        ({"token": [TENSOR]}, "token and progress belong together"),
        ({"progress": [TENSOR]}, "token and progress belong together"),
        (
            {"token": [TENSOR], "progress": [TENSOR | {"name": "seen"}]},
            r"files has none of begin\.onnx and step\.onnx, expected begin\.onnx and step\.onnx",
        ),
        ({"golden": [[0.5] * 8] * 3}, "golden must be 4 x 8"),
        ({"golden": [[1.5] * 8] * 4}, "golden.0.0: Input should be less than or equal to 1, came 1.5"),
        ({"golden": [[float("nan")] * 8] * 4}, "golden.0.0: Input should be a finite number, came nan"),
        ({"coverage": {"levels": [0.9], "experts": []}}, "coverage has 0 tables for 1 levels"),
        ({"coverage": {"levels": [0.9], "experts": [[[1], [1]]]}}, "layer 1 has 1 distances, expected 2"),
        ({"coverage": {"levels": [0.9], "experts": [[[1]]]}}, "coverage at 0.9 must have 4 layers"),
        (
            {"coverage": {"levels": [0.9], "experts": FIRST_ONE, "thresholds": FIRST_ONE * 2}},
            "coverage has 2 tables of thresholds for 1 levels",
        ),
        (
            {"coverage": {"levels": [0.9], "experts": FIRST_ONE, "thresholds": [[[0.5], [0.5]]]}},
            "layer 1 has 1 distances, expected 2",
        ),
        (
            {"coverage": {"levels": [0.9], "experts": FIRST_ONE, "thresholds": [[[0.5]]]}},
            "coverage's thresholds must have 4 layers",
        ),
        (
            {"coverage": {"levels": [0.9], "experts": FIRST_ONE, "thresholds": [[[2.0]]]}},
            "coverage.thresholds.0.0.0: Input should be less than or equal to 1, came 2",
        ),
        ({"files": {}}, "files lacks advance.onnx, predict.onnx"),
        ({"files": {"../x": {"sha256": "0" * 64, "bytes": 1}}}, "files.../x"),
        ({"created": "yesterday"}, "created: .*came 'yesterday'"),
        (
            {"metrics": {"validation": {"1": {"recall": "high"}}}},
            "metrics.validation.1.recall: .*came 'high'",
        ),
        ({"lineage": {}}, "lineage.traces: Field required; .*and 4 more"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_a_wrong_field_is_named_with_what_came(fields, changed, reason):
    content = json.dumps(fields | changed).encode()
    with pytest.raises(ManifestInvalid, match=rf"^{ORIGIN}:? .*{reason}"):
        read_manifest(content, model="toy", version=1, origin=ORIGIN)


def test_graphs_for_steps_come_in_pairs_and_described(fields):
    described = {"token": [TENSOR], "progress": [TENSOR | {"name": "seen"}]}
    begin = {"begin.onnx": fields["files"]["predict.onnx"]}
    for changed in ({}, described):
        content = json.dumps(fields | changed | {"files": fields["files"] | begin}).encode()
        with pytest.raises(
            ManifestInvalid, match=r"files has begin\.onnx of begin\.onnx and step\.onnx, expected"
        ):
            read_manifest(content, model="toy", version=1, origin=ORIGIN)


def test_a_manifest_written_before_there_were_steps_is_read(fields, manifest):
    older = {name: value for name, value in fields.items() if name not in ("token", "progress")}
    assert read_manifest(json.dumps(older).encode(), model="toy", version=1, origin=ORIGIN) == manifest


def test_a_missing_field_is_named(fields):
    content = json.dumps({name: value for name, value in fields.items() if name != "golden"}).encode()
    with pytest.raises(ManifestInvalid, match="golden: Field required"):
        read_manifest(content, model="toy", version=1, origin=ORIGIN)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\x80\x81", b"[" * 100_000], ids=repr)
def test_what_is_no_json_object_is_refused(content):
    with pytest.raises(ManifestInvalid, match=f"^{ORIGIN}: "):
        read_manifest(content, model="toy", version=1, origin=ORIGIN)


def test_a_message_stays_short_whatever_came(fields):
    content = json.dumps(fields | {"schema_version": "x" * 100_000}).encode()
    with pytest.raises(ManifestInvalid) as refusal:
        read_manifest(content, model="toy", version=1, origin=ORIGIN)
    assert len(refusal.value.message) < 300


def test_a_manifest_that_no_reader_would_accept_is_not_written(manifest):
    huge = manifest.model_copy(
        update={"metrics": {"test": {str(d): {"recall": 0.5} for d in range(200_000)}}}
    )
    with pytest.raises(ManifestInvalid, match="4194304 are allowed"):
        written(huge)


def test_a_draft_says_everything_but_number_time_and_files():
    assert Manifest.model_fields.keys() - Draft.model_fields.keys() == {"version", "created", "files"}
