"""A set of Parquet shards that is damaged, not whole or malformed is refused with its file and the reason."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.traces.made_up import TOY, files, made_up_trace, same, write_shards
from traces import shard
from traces.errors import TraceError, TraceFormatError
from traces.parquet import read
from traces.shard import DIGEST_KEY, METADATA_KEY
from traces.trace import RoutingTrace


def drop(number: int) -> Callable[[Path], None]:
    return lambda folder: files(folder)[number].unlink()


def truncate(share: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = files(folder)[2].read_bytes()
        files(folder)[2].write_bytes(whole[: int(len(whole) * share)])

    return change


def put(content: bytes) -> Callable[[Path], None]:
    return lambda folder: _void(files(folder)[2].write_bytes(content))


def _void(_: object) -> None: ...


def mix(trace: RoutingTrace, source: str) -> Callable[[Path], None]:
    """Another set's third shard, of as many tokens, in the place of this one's."""

    def change(folder: Path) -> None:
        other = write_shards(folder.parent / "other", trace, max_shard_tokens=8, source=source)
        shutil.copy(files(other)[2], files(folder)[2])

    return change


LENGTHS = (5, 3, 4, 7, 3)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        pytest.param(
            drop(0), "part-000001", "is shard 1 .* expected shard 0 at token 0: one is missing", id="first"
        ),
        pytest.param(drop(1), "part-000002", "is shard 2 .* token 12, expected shard 1", id="middle"),
        pytest.param(drop(3), "part-000002", "goes on after it: the rest is missing", id="last"),
        pytest.param(truncate(0), "part-000002", "cannot be read as Parquet", id="emptied"),
        pytest.param(truncate(0.5), "part-000002", "cannot be read as Parquet", id="half"),
        pytest.param(truncate(0.99), "part-000002", "cannot be read as Parquet", id="almost whole"),
        pytest.param(put(b"PAR1 no more PAR1"), "part-000002", "cannot be read as", id="no Parquet"),
        pytest.param(
            mix(made_up_trace(lengths=LENGTHS), "elsewhere"),
            "part-000002",
            "is of another recording",
            id="provenance",
        ),
        pytest.param(
            mix(made_up_trace(replace(TOY, model="other"), LENGTHS), "made up"),
            "part-000002",
            "model='other'.* is of another recording than",
            id="model",
        ),
        pytest.param(
            mix(made_up_trace(lengths=LENGTHS, gates=False), "made up"),
            "part-000002",
            "other columns",
            id="columns",
        ),
        pytest.param(
            mix(made_up_trace(lengths=(5, 2, 4, 7, 3)), "made up"),
            "part-000002",
            "begins at token 11",
            id="tokens",
        ),
        pytest.param(
            mix(made_up_trace(lengths=(5, 3, 3, 1, 7, 3)), "made up"),
            "part-000002",
            "token 0 is of sequence 4, 'domain 0', after sequence 2, 'domain 0'",
            id="sequences",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_refused_with_the_shard(
    shards: Path, damage: Callable[[Path], None], file: str, reason: str
) -> None:
    damage(shards)
    with pytest.raises(TraceError, match=reason) as refusal:
        read(shards)
    assert refusal.value.message.startswith(f"{shards / file}.parquet")


def test_one_shard_of_several_is_no_trace(shards: Path) -> None:
    with pytest.raises(TraceFormatError, match="goes on after it"):
        read(files(shards)[0])


def test_a_shard_after_the_last_is_refused(shards: Path) -> None:
    alone = write_shards(shards.parent / "alone", made_up_trace(lengths=(8,)))
    shutil.copy(files(alone)[0], files(shards)[0])
    with pytest.raises(TraceFormatError, match="ends the recording, but more shards follow"):
        read(shards)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    trace = made_up_trace()
    file = files(write_shards(tmp_path / "t", trace))[0]
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        assert same(read(file), trace)
    except TraceError as error:
        assert error.message.startswith(str(file))


def rewrite(file: Path, table: pa.Table, header: str | None = None) -> Path:
    """The shard with other rows or another footer, its checksum right."""
    text = pq.read_metadata(file).metadata[METADATA_KEY.encode()] if header is None else header.encode()
    with pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({METADATA_KEY: text, DIGEST_KEY: hashlib.sha256(text).hexdigest()})
    return file


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A set's only shard."""
    return files(write_shards(tmp_path / "alone", made_up_trace()))[0]


def test_a_parquet_file_of_something_else_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(TraceFormatError, match="no routing trace: its footer lacks"):
        read(tmp_path / "x.parquet")


HEADER = {
    "schema_version": 1,
    "spec": {"model": "toy", "num_layers": 3, "num_experts": 8, "top_k": 2},
    "provenance": {},
    "shard": 0,
    "first_token": 0,
    "last": True,
}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        pytest.param("{", "is not understood", id="no JSON"),
        pytest.param("[]", "is not understood", id="list"),
        pytest.param({**HEADER, "schema_version": 2}, "schema version is 2, expected 1", id="version"),
        pytest.param({**HEADER, "more": 1}, "more", id="unknown field"),
        pytest.param({k: v for k, v in HEADER.items() if k != "last"}, "last", id="missing field"),
        pytest.param({**HEADER, "shard": "0"}, "found '0', expected int", id="type"),
        pytest.param({**HEADER, "provenance": None}, "found None, expected dict", id="provenance"),
        pytest.param({**HEADER, "spec": {"model": "toy"}}, "num_layers", id="half a spec"),
        pytest.param({**HEADER, "spec": {**HEADER["spec"], "top_k": 9}}, "top_k is 9", id="spec"),
        pytest.param(
            {**HEADER, "spec": {**HEADER["spec"], "top_k": "2"}}, "is not understood", id="spec type"
        ),
        pytest.param(
            {**HEADER, "spec": {**HEADER["spec"], "top_k": 1}}, "has columns .*expected", id="columns"
        ),
    ],
)
def test_a_footer_that_is_not_understood_is_refused(alone: Path, header: object, reason: str) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    with pytest.raises(TraceFormatError, match=reason):
        read(rewrite(alone, pq.read_table(alone), text))


def test_a_footer_whose_text_was_changed_is_refused(alone: Path) -> None:
    content = alone.read_bytes()
    alone.write_bytes(content.replace(b'"model": "toy"', b'"model": "tov"'))
    with pytest.raises(TraceFormatError, match="checksum does not match"):
        read(alone)


def changed(name: str, row: int, value: object) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        field = table.schema.field(name)
        return table.set_column(table.schema.names.index(name), field, pa.array(values, field.type))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            changed("experts", 5, [0, 1, 2, 3, 4, 8]), "token 5, layer 2: expert id is 8", id="expert"
        ),
        pytest.param(
            changed("experts", 5, [0, 1, 2, 2, 4, 5]), "token 5, layer 1: expert 2 .* twice", id="twice"
        ),
        pytest.param(
            changed("gates", 7, [1, 1, 1, 1, 1, float("nan")]), "token 7, layer 2: gate is nan", id="gate"
        ),
        pytest.param(changed("token_id", 2, -2), "token 2: token id is -2", id="token id"),
        pytest.param(changed("domain", 1, "other"), "token 1 is of sequence 0, 'other', after", id="domain"),
        pytest.param(changed("sequence", 2, 5), "token 2 is of sequence 5, 'domain 0', after", id="skipped"),
        pytest.param(
            changed("sequence", 6, 0), "token 6 is of sequence 0, 'domain 0', after", id="backwards"
        ),
        pytest.param(changed("sequence", 0, -1), "token 0 is of sequence -1", id="negative"),
        pytest.param(lambda table: table.slice(0, 0), "has no rows", id="no rows"),
        pytest.param(lambda table: table.drop_columns(["sequence"]), "has columns", id="no sequence"),
        pytest.param(
            lambda table: table.set_column(0, "sequence", table["sequence"].cast(pa.int32())),
            "has columns sequence int32",
            id="type",
        ),
    ],
)
def test_malformed_rows_are_refused_with_file_and_token(
    alone: Path, change: Callable[[pa.Table], pa.Table], reason: str
) -> None:
    with pytest.raises(TraceError, match=reason) as refusal:
        read(rewrite(alone, change(pq.read_table(alone))))
    assert refusal.value.message.startswith(str(alone))


def test_a_row_group_beyond_the_limit_is_refused(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "MAX_ROWS_PER_GROUP", 7)
    with pytest.raises(TraceFormatError, match="row group 0 has 8 rows"):
        read(alone)
