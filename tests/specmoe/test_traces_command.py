"""`specmoe traces import|split|info`, run as a user runs it."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoe.cli import main
from tests.traces.made_up import FIXTURES, made_up_trace, preamble, same, write_npz, write_route_csv
from traces.files import digest, load
from traces.importers.formats import FORMATS
from traces.parquet import TraceWriter
from traces.shard import Shard
from traces.spec import RoutingSpec
from traces.trace import concatenate

Captured = pytest.CaptureFixture[str]
HALVES = {"a": range(25), "b": range(25, 40)}


def run(*arguments: object) -> int:
    return main(["traces", *map(str, arguments)])


def test_an_imported_npz_is_the_same_trace(tmp_path: Path, capsys: Captured) -> None:
    assert run("import", write_npz(tmp_path / "x.npz"), "--out", tmp_path / "t") == 0
    assert "8 tokens of 3 sequences of toy" in capsys.readouterr().out
    assert same(load(tmp_path / "t"), made_up_trace())


def test_an_import_tells_where_it_comes_from(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "x.npz")
    run("import", source, "--out", tmp_path / "t")
    header = Shard(tmp_path / "t" / "part-000000.parquet").header
    assert header.provenance == {"source": "x.npz", "sha256": digest(source)}


def test_a_folder_is_imported_as_one_trace(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    parts = [made_up_trace(seed=seed) for seed in range(2)]
    for name, part in zip("ab", parts, strict=True):
        write_npz(tmp_path / "in" / f"{name}.npz", part)
    assert run("import", tmp_path / "in", "--out", tmp_path / "deep" / "t") == 0
    assert same(load(tmp_path / "deep" / "t"), concatenate(parts))


def test_a_csv_import_tells_what_it_left_out(tmp_path: Path, capsys: Captured) -> None:
    source = write_route_csv(tmp_path / "x.csv")
    assert run("import", source, "--out", tmp_path / "t", "--model", "toy", "--domain", "chat") == 0
    assert "4 prompt tokens were left out" in capsys.readouterr().out
    trace = load(tmp_path / "t")
    assert (trace.spec.model, trace.domains) == ("toy", ("chat", "chat"))


@pytest.mark.parametrize(
    ("fixture", "options", "line"),
    [
        (
            "sglang.jsonl",
            ["--num-experts", 4, "--num-layers", 3, "--top-k", 2],
            "5 tokens of 2 sequences of toy",
        ),
        ("sglang_recorder.pt", [], "5 tokens of 2 sequences of toy, 2 layers"),
        ("moe_trace.csv", ["--num-experts", 4], "2 tokens of 1 sequence of toy, 2 layers"),
        ("fingerprint.json", ["--num-experts", 4], "3 tokens of 2 sequences of toy, 2 layers"),
        ("esft", ["--num-experts", 4, "--top-k", 2], "3 tokens of 2 sequences of toy, 2 layers"),
        ("router_trace.jsonl", ["--num-experts", 4], "3 tokens of 1 sequence of toy, 2 layers"),
    ],
)
def test_a_dump_is_told_by_its_look_and_imported(
    tmp_path: Path, capsys: Captured, fixture: str, options: list[object], line: str
) -> None:
    assert run("import", FIXTURES / fixture, "--out", tmp_path / "t", "--model", "toy", *options) == 0
    assert line in capsys.readouterr().out
    assert load(tmp_path / "t").spec.model == "toy"


def test_responses_are_told_from_other_json_and_imported(tmp_path: Path, capsys: Captured) -> None:
    source = FIXTURES / "vllm.jsonl"
    assert run("import", source, "--out", tmp_path / "t", "--num-experts", 4, "--domain", "chat") == 0
    printed = capsys.readouterr().out
    assert "5 tokens of 2 sequences of Toy-MoE, 2 layers" in printed
    assert "2 tokens were left out: the dump has no routing of them" in printed
    assert "1 completions were left out" in printed
    assert "Layers without routing (dense) do not count: 0." in printed
    trace = load(tmp_path / "t")
    assert (trace.spec.num_experts, trace.domains) == (4, ("chat", "chat"))


def test_a_folder_of_responses_is_imported_as_one_trace(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        shutil.copy(FIXTURES / "vllm.jsonl", tmp_path / "in" / f"{name}.jsonl")
    assert run("import", tmp_path / "in", "--out", tmp_path / "t", "--num-experts", 4) == 0
    header = Shard(tmp_path / "t" / "part-000000.parquet").header
    told = subprocess.run(
        "sha256sum *.jsonl | sha256sum", shell=True, cwd=tmp_path / "in", capture_output=True, check=True
    )
    assert header.provenance["sha256"] == told.stdout.decode().split()[0]
    assert load(tmp_path / "t").num_sequences == 4


def test_json_beside_arrays_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_npz(tmp_path / "in" / "x.npz")
    (tmp_path / "in" / "info.json").write_text("{}")
    assert run("import", tmp_path / "in", "--out", tmp_path / "t") == 0
    assert same(load(tmp_path / "t"), made_up_trace())


def test_a_named_format_is_found_among_files_of_other_kinds(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(FIXTURES / "router_trace.jsonl", tmp_path / "in" / "router_trace_rank0.jsonl")
    (tmp_path / "in" / "router_state_rank0.pt").write_bytes(b"weights")
    told = ["--model", "toy", "--num-experts", 4]
    assert run("import", tmp_path / "in", "--out", tmp_path / "t", *told) == 2
    assert "has .jsonl and .pt trace files, expected one kind" in capsys.readouterr().err
    assert run("import", tmp_path / "in", "--out", tmp_path / "t", *told, "--format", "router-trace") == 0
    assert load(tmp_path / "t").num_tokens == 3


def test_files_with_experts_in_other_layers_do_not_go_together(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "in").mkdir()
    text = (FIXTURES / "router_trace.jsonl").read_text()
    (tmp_path / "in" / "a.jsonl").write_text(text)
    (tmp_path / "in" / "b.jsonl").write_text(text.replace('"layer": 3', '"layer": 5'))
    options = ["--out", tmp_path / "t", "--model", "toy", "--num-experts", 4]
    assert run("import", tmp_path / "in", *options) == 2
    assert "b.jsonl has routing in layers [1, 5]" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_the_number_of_experts_is_asked_for_where_the_source_does_not_say(
    tmp_path: Path, capsys: Captured
) -> None:
    assert run("import", FIXTURES / "vllm.jsonl", "--out", tmp_path / "t") == 2
    assert "Tell it: --num-experts N." in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_what_a_format_says_itself_is_not_to_be_told(tmp_path: Path, capsys: Captured) -> None:
    assert run("import", write_npz(tmp_path / "x.npz"), "--out", tmp_path / "t", "--num-experts", 8) == 2
    assert "is read as npz, which has no use for --num-experts. Leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"what": 1}', "[]"], ids=["another", "nothing"])
def test_json_of_no_known_format_is_refused_with_a_list_of_them(
    tmp_path: Path, capsys: Captured, text: str
) -> None:
    (tmp_path / "x.json").write_text(text)
    assert run("import", tmp_path / "x.json", "--out", tmp_path / "t") == 2
    error = capsys.readouterr().err
    assert "Name its format: --format with one of npz (" in error
    assert all(f"{name} (" in error for name in FORMATS)


def test_a_named_format_reads_files_of_its_kind_only(tmp_path: Path, capsys: Captured) -> None:
    source = write_npz(tmp_path / "x.npz")
    assert run("import", source, "--out", tmp_path / "t", "--format", "vllm") == 2
    assert "has extension '.npz', expected .json, .jsonl" in capsys.readouterr().err


def test_a_file_whose_model_has_no_usable_name_is_imported_under_another(
    tmp_path: Path, capsys: Captured
) -> None:
    source = write_route_csv(tmp_path / "x.csv", head=preamble(model="/m/my toy.gguf"))
    assert run("import", source, "--out", tmp_path / "t") == 2
    assert "--model NAME" in capsys.readouterr().err
    assert run("import", source, "--out", tmp_path / "t", "--model", "toy") == 0


def test_an_npz_without_a_name_is_told_how_to_get_one(tmp_path: Path, capsys: Captured) -> None:
    source = write_npz(tmp_path / "x.npz", model=None)
    assert run("info", source) == 2
    assert "specmoe traces import SOURCE --out FOLDER --model NAME" in capsys.readouterr().err
    assert run("import", source, "--out", tmp_path / "t", "--model", "toy") == 0


def test_a_long_file_is_written_in_pieces_and_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoe.trace_import.TOKENS_AT_ONCE", 5)
    trace = made_up_trace(lengths=(3, 12, 1, 1, 4))
    run("import", write_npz(tmp_path / "x.npz", trace), "--out", tmp_path / "t")
    assert same(load(tmp_path / "t"), trace)


def test_an_import_shows_a_bar_that_ends_at_the_end(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoe.trace_import.TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trace = made_up_trace(lengths=(1,) * 49)
    run("import", write_npz(tmp_path / "x.npz", trace), "--out", tmp_path / "t")
    assert "importing: 100%" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: Captured) -> None:
    source = write_npz(tmp_path / "x.npz")
    assert run("import", source, "--out", tmp_path) == 2
    assert "exists already and is not an empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_a_failed_import_leaves_nothing_behind(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "in").mkdir()
    write_npz(tmp_path / "in" / "a.npz")
    write_npz(tmp_path / "in" / "b.npz", gates=np.full((8, 3, 2), np.nan))
    assert run("import", tmp_path / "in", "--out", tmp_path / "t") == 2
    assert "b.npz: token 0, layer 0: gate is nan" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_traces_of_two_models_are_not_imported_together(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "in").mkdir()
    write_npz(tmp_path / "in" / "a.npz")
    write_npz(tmp_path / "in" / "b.npz", made_up_trace(RoutingSpec("other", 3, 8, 2)))
    assert run("import", tmp_path / "in", "--out", tmp_path / "t") == 2
    assert "b.npz is of RoutingSpec(model='other'" in capsys.readouterr().err


def test_a_source_that_names_its_domains_keeps_them(tmp_path: Path, capsys: Captured) -> None:
    source = write_npz(tmp_path / "x.npz")
    assert run("import", source, "--out", tmp_path / "t", "--domain", "chat") == 2
    assert "names its domains itself" in capsys.readouterr().err


def test_shards_need_no_import(tmp_path: Path, capsys: Captured) -> None:
    run("import", write_npz(tmp_path / "x.npz"), "--out", tmp_path / "t")
    assert run("import", tmp_path / "t", "--out", tmp_path / "again") == 2
    assert "own form already" in capsys.readouterr().err


def test_an_unwritable_place_is_named(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").write_text("")
    source = write_npz(tmp_path / "x.npz")
    assert run("import", source, "--out", tmp_path / "file" / "t") == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("traces.parquet._sync", full)
    assert run("import", write_npz(tmp_path / "x.npz"), "--out", tmp_path / "t") == 2
    assert f"{tmp_path / 't'} cannot be read or written: No space left" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_split_is_written_part_by_part_and_told(tmp_path: Path, capsys: Captured) -> None:
    trace = made_up_trace(lengths=(5,) * 40)
    sources = [write_npz(tmp_path / f"{name}.npz", trace.select(list(part))) for name, part in HALVES.items()]
    assert run("split", *sources, "--out", tmp_path / "p", "--test", 0.2, "--hold-out", "domain 1") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/p/train: 70 tokens of 14 sequences (70.0%): domain 0 70",
        f"{tmp_path}/p/validation: 10 tokens of 2 sequences (10.0%): domain 0 10",
        f"{tmp_path}/p/test: 20 tokens of 4 sequences (20.0%): domain 0 20",
        f"{tmp_path}/p/held-out: 100 tokens of 20 sequences: domain 1 100",
    ]
    assert same(load(tmp_path / "p" / "held-out"), trace.select(range(1, 40, 2)))
    header = Shard(tmp_path / "p" / "test" / "part-000000.parquet").header
    assert header.provenance == {
        "source": "a.npz, b.npz",
        "sha256": ", ".join(map(digest, sources)),
        "split": "validation 0.1, test 0.2, seed 0",
        "held_out": "domain 1",
        "part": "test",
    }


def test_a_share_of_0_writes_no_folder(tmp_path: Path) -> None:
    source = write_npz(tmp_path / "x.npz")
    assert run("split", source, "--out", tmp_path / "p", "--validation", 0, "--test", 0) == 0
    assert [part.name for part in (tmp_path / "p").iterdir()] == ["train"]
    assert same(load(tmp_path / "p" / "train"), made_up_trace())


def test_a_source_given_twice_is_told_and_stays_together(tmp_path: Path, capsys: Captured) -> None:
    source = write_npz(tmp_path / "x.npz")
    assert run("split", source, source, "--out", tmp_path / "p") == 0
    assert "Sequences that repeat another one, and are in the same part: 3." in capsys.readouterr().out
    assert all(load(tmp_path / "p" / part).num_sequences == 2 for part in ("train", "validation", "test"))


def test_a_split_of_a_collected_trace_keeps_prefill_and_says_that_hidden_states_are_left_out(
    tmp_path: Path, capsys: Captured
) -> None:
    trace = made_up_trace(lengths=(5, 4, 3), prefill=True)
    form = {"gates": True, "token_ids": True, "prefill": True}
    with TraceWriter(tmp_path / "x", trace.spec, **form, hidden_size=2, provenance={}) as writer:
        writer.append(trace, np.zeros((12, trace.spec.num_layers, 2), np.float16))
    assert run("split", tmp_path / "x", "--out", tmp_path / "p", "--validation", 0, "--test", 0) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Hidden states were left out."
    assert same(load(tmp_path / "p" / "train"), trace)


def test_a_split_overwrites_nothing(tmp_path: Path, capsys: Captured) -> None:
    source = write_npz(tmp_path / "x.npz")
    assert run("split", source, "--out", tmp_path) == 2
    assert "exists already and is not an empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hold-out", "law"], "no domain 'law' to hold out, only domain 0, domain 1. Name one of them"),
        (["--hold-out", "domain 0"], "sequences to share out: 1, expected 3 at least"),
        (["--validation", 0.7, "--test", 0.3], "are 1.0 in all, expected less than 1"),
    ],
)
def test_a_refused_split_writes_nothing(
    tmp_path: Path, capsys: Captured, options: list[object], message: str
) -> None:
    assert run("split", write_npz(tmp_path / "x.npz"), "--out", tmp_path / "p", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_traces_of_two_models_are_not_split_together(tmp_path: Path, capsys: Captured) -> None:
    one = write_npz(tmp_path / "a.npz")
    other = write_npz(tmp_path / "b.npz", made_up_trace(RoutingSpec("toy", 4, 8, 2)))
    assert run("split", one, other, "--out", tmp_path / "p") == 2
    assert f"{other} is of RoutingSpec(model='toy', num_layers=4" in capsys.readouterr().err


@pytest.mark.parametrize("made", [True, False], ids=["into an empty folder", "into a new one"])
def test_a_split_that_meets_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    def full(path: Path) -> None:
        if "validation" in str(path):  # train has been written by then
            raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "p"
    if made:
        out.mkdir()
    monkeypatch.setattr("traces.parquet._sync", full)
    assert run("split", write_npz(tmp_path / "x.npz"), "--out", out) == 2
    assert f"{out} cannot be read or written: No space left" in capsys.readouterr().err
    assert (list(out.iterdir()) == []) if made else not out.exists()


def test_a_split_shortens_a_long_list_of_domains(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmoe.trace_split.MAX_DOMAINS_SHOWN", 1)
    run("split", write_npz(tmp_path / "x.npz"), "--out", tmp_path / "p", "--validation", 0, "--test", 0)
    assert "domain 0 7 and 1 domains more" in capsys.readouterr().out


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `info --json` writes of a trace of twelve sequences."""
    folder = tmp_path_factory.mktemp("info")
    trace = made_up_trace(RoutingSpec("toy", 5, 8, 2), (7, 20, 3) * 4)
    assert run("info", write_npz(folder / "x.npz", trace), "--json", folder / "info.json") == 0
    document: dict[str, Any] = json.loads((folder / "info.json").read_text())
    return document


def test_info_counts(info: dict[str, Any]) -> None:
    assert (info["tokens"], info["sequences"]) == (120, 12)
    assert info["sequence_tokens"] == {"shortest": 3, "median": 7.0, "longest": 20}
    assert info["domains"]["domain 0"]["sequences"] == 6
    assert len(info["usage_entropy"]) == len(info["temporal_locality"]) == 5


def test_info_tells_recall_at_three_distances_on_sequences_held_out(info: dict[str, Any]) -> None:
    baselines = info["baselines"]
    assert (baselines["fitted"]["sequences"], baselines["scored"]["sequences"]) == (10, 2)
    assert set(baselines["recall"]["layer markov"]) == {"start", "1", "4"}
    assert baselines["recall"]["oracle"]["1"] == {"recall_at_k": 1.0, "recall_at_2k": 1.0}


def test_info_of_random_routing_finds_nothing_to_predict(info: dict[str, Any]) -> None:
    for scores in info["baselines"]["recall"]["popularity"].values():
        assert scores["recall_at_k"] < 0.5


def test_info_prints_what_it_finds(tmp_path: Path, capsys: Captured) -> None:
    run("import", write_npz(tmp_path / "x.npz", made_up_trace(lengths=(5,) * 6)), "--out", tmp_path / "t")
    assert run("info", tmp_path / "t") == 0
    printed = capsys.readouterr().out
    for part in ("top-2, with token ids and gates", "30 tokens of 6 sequences", "domain 1", "layer markov"):
        assert part in printed


def test_info_says_when_sequences_are_too_few_to_hold_one_out(tmp_path: Path, capsys: Captured) -> None:
    assert run("info", write_npz(tmp_path / "x.npz"), "--json", tmp_path / "x.json") == 0
    assert "on whole sequences, 5 at least, and here are 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["baselines"] is None


def test_info_of_single_tokens_has_no_locality(tmp_path: Path, capsys: Captured) -> None:
    trace = made_up_trace(lengths=(1, 1), gates=False, token_ids=False)
    assert run("info", write_npz(tmp_path / "x.npz", trace), "--json", tmp_path / "x.json") == 0
    assert "with neither token ids nor gates" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["temporal_locality"] is None


def test_info_shortens_a_long_list_of_domains(tmp_path: Path, capsys: Captured) -> None:
    domains = np.array([f"domain {number}" for number in range(3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specmoe.commands.traces.MAX_DOMAINS_SHOWN", 2)
        run("info", write_npz(tmp_path / "x.npz", domains=domains))
    assert "and 1 domains more" in capsys.readouterr().out


def test_info_of_a_malformed_file_names_it(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\3\4")
    assert run("info", tmp_path / "x.npz") == 2
    assert f"specmoe: {tmp_path / 'x.npz'} cannot be read as .npz" in capsys.readouterr().err
