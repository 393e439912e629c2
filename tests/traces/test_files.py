"""Opening whatever holds a trace, and its digest."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.traces.made_up import TOY, made_up_trace, same, write_npz, write_route_csv
from traces.errors import TraceError
from traces.files import digest, load
from traces.parquet import TraceWriter
from traces.spec import RoutingSpec
from traces.trace import RoutingTrace, concatenate


def shards(folder: Path, trace: RoutingTrace) -> Path:
    with TraceWriter(folder, TOY, gates=True, token_ids=True, provenance={}, max_shard_tokens=4) as writer:
        writer.append(trace)
    return folder


def test_an_npz_file_is_loaded(tmp_path: Path) -> None:
    assert same(load(write_npz(tmp_path / "x.npz")), made_up_trace())


def test_a_csv_file_is_loaded(tmp_path: Path) -> None:
    assert load(write_route_csv(tmp_path / "x.csv")).num_tokens == 6


def test_a_folder_of_shards_is_one_trace(tmp_path: Path) -> None:
    assert same(load(shards(tmp_path / "t", made_up_trace())), made_up_trace())


def test_a_folder_of_npz_files_is_put_together_in_name_order(tmp_path: Path) -> None:
    parts = [made_up_trace(seed=seed) for seed in range(3)]
    for name, part in zip("bca", parts, strict=True):
        write_npz(tmp_path / f"{name}.npz", part)
    (tmp_path / "README.md").write_text("no trace")
    assert same(load(tmp_path), concatenate([parts[2], parts[0], parts[1]]))


def test_a_folder_with_traces_of_two_models_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz", made_up_trace(RoutingSpec("other", 3, 8, 2)))
    with pytest.raises(TraceError, match=r"b\.npz is of .*other.*, but .*a\.npz of .*toy"):
        load(tmp_path)


def test_a_folder_with_gates_in_one_file_only_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", made_up_trace(gates=False))
    write_npz(tmp_path / "b.npz")
    with pytest.raises(TraceError, match=r"b\.npz has gates, .*a\.npz has none"):
        load(tmp_path)


def test_a_malformed_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    write_npz(tmp_path / "b.npz", gates=np.full((8, 3, 2), np.nan))
    with pytest.raises(TraceError, match=r"b\.npz: token 0, layer 0: gate is nan"):
        load(tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        load(tmp_path / "x.npz")


def test_an_unknown_extension_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(TraceError, match=r"extension '\.json', expected \.npz, \.csv, \.parquet"):
        load(tmp_path / "x.json")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="has no trace files"):
        load(tmp_path)


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "x.npz")
    write_route_csv(tmp_path / "x.csv")
    with pytest.raises(TraceError, match=r"has \.csv and \.npz trace files, expected one kind"):
        load(tmp_path)


def test_a_files_digest_is_its_sha256(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folders_digest_is_what_sha256sum_tells(tmp_path: Path) -> None:
    shards(tmp_path / "t", made_up_trace())
    (tmp_path / "t" / "README.md").write_text("no trace")
    told = subprocess.run(
        "sha256sum *.parquet | sha256sum", shell=True, cwd=tmp_path / "t", capture_output=True, check=True
    )
    assert told.stdout.decode().split()[0] == digest(tmp_path / "t")


def test_a_folders_digest_changes_with_a_name_and_with_a_byte(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz")
    digests = {digest(tmp_path)}
    digests.add(digest(path.rename(tmp_path / "b.npz").parent))
    write_npz(tmp_path / "b.npz", made_up_trace(seed=1))
    assert len(digests | {digest(tmp_path)}) == 3
