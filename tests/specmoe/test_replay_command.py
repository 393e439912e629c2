"""`specmoe replay` as a person runs it: a trace file, a running service, a table at the end."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmoe.cli import main
from specmoe.replay import Replay
from tests.contract.odd_server import OddServer, answer
from tests.contract.running import running_service
from tests.toy_version import toy_store

TOKENS = 10


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running service with the toy model: 4 layers x 8 experts, top-2."""
    with running_service(toy_store(tmp_path_factory.mktemp("replay"))) as reached:
        yield reached["base_url"]


def recording(folder: Path, *, experts: int = 8, gates: bool = True, token_ids: bool = True) -> Path:
    """A trace of two sequences for the toy model, or one of another number of experts."""
    rng = np.random.default_rng(0)
    routed = np.argsort(rng.random((TOKENS, 4, experts)), axis=-1)[..., :2]
    arrays: dict[str, Any] = {"experts": routed.astype(np.uint8), "starts": np.array([0, 6, TOKENS])}
    if gates:
        arrays["gates"] = np.full((TOKENS, 4, 2), 0.5, np.float16)
    if token_ids:
        arrays["token_ids"] = np.arange(TOKENS, dtype=np.int32)
    np.savez(folder / "trace.npz", num_experts=experts, model="toy", **arrays)
    return folder / "trace.npz"


def replay(trace: Path, url: str, *flags: str) -> int:
    return main(["replay", str(trace), "--url", url, "--model", "toy", "--timeout-ms", "10000", *flags])


def replayed(folder: Path, url: str, *flags: str, **changes: bool) -> dict[str, Any]:
    """The numbers of a replay that must succeed."""
    out = folder / "out.json"
    assert replay(recording(folder, **changes), url, "--json", str(out), *flags) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def test_it_prints_recall_cache_and_latency(url: str, tmp_path: Path, capsys: Any) -> None:
    assert replay(recording(tmp_path), url, "--every", "1") == 0
    printed = capsys.readouterr().out
    assert "toy (version 2), 10 tokens, asked 4 times each" in printed
    assert "8 of 32 experts resident" in printed
    for words in (
        "recall@2",
        "recall@4",
        "start",
        "hit rate",
        "LRU and forecasts",
        "p99",
        "unanswered     0 of 40",
    ):
        assert words in printed


@pytest.mark.parametrize("way", [[], ["--rest"]], ids=["stream", "rest"])
def test_its_numbers_are_complete(url: str, tmp_path: Path, way: list[str]) -> None:
    report = replayed(tmp_path, url, "--every", "1", *way)
    assert report["complete"]
    assert (report["versions"], report["answered"], report["unanswered"]) == ([2], 40, {})
    assert {name: row["experts"] for name, row in report["recall"].items()} == {
        "start": 80,
        "1": 60,
        "2": 40,
        "3": 20,
    }
    assert report["cache"]["lru"]["uses"] == report["cache"]["lru_and_forecast"]["uses"] == 80
    assert list(report["latency_ms"]) == ["p50", "p90", "p99", "max"]


@pytest.mark.parametrize("way", [[], ["--adapt"], ["--rest"]], ids=["stream", "adapting", "rest"])
def test_with_coverage_it_prefetches_sets_and_tells_what_they_held(
    url: str, tmp_path: Path, capsys: Any, way: list[str]
) -> None:
    report = replayed(tmp_path, url, "--every", "1", "--coverage", "0.9", *way)
    assert report["recall"] == {}
    assert {name: row["layers"] for name, row in report["coverage"].items()} == {
        "start": 40,
        "1": 30,
        "2": 20,
        "3": 10,
        "all": 100,
    }
    whole = report["coverage"]["all"]
    printed = capsys.readouterr().out
    assert f"all {whole['covered']:>21.3f} {whole['mean_set_size']:>10.1f}" in printed
    assert "recall@2" not in printed


def test_sets_that_adapt_grow_where_they_miss(url: str, tmp_path: Path) -> None:
    published, adapted = (
        replayed(tmp_path, url, "--every", "1", "--coverage", "0.99", *way)["coverage"]["all"]
        for way in ([], ["--adapt"])
    )
    assert published["covered"] < adapted["covered"]
    assert published["mean_set_size"] < adapted["mean_set_size"]


def test_by_default_it_asks_at_token_start_and_after_every_four_layers(url: str, tmp_path: Path) -> None:
    assert replayed(tmp_path, url)["questions_after_layers"] == [0]


def test_a_cache_that_holds_everything_misses_each_expert_once(url: str, tmp_path: Path) -> None:
    report = replayed(tmp_path, url, "--cache-share", "1")
    different = {
        (layer, expert)
        for token in np.load(tmp_path / "trace.npz")["experts"]
        for layer, row in enumerate(token)
        for expert in row.tolist()
    }
    assert report["cache"]["lru"]["fetched_on_demand"] == len(different)


def test_prefetching_every_expert_leaves_nothing_to_fetch_on_demand(url: str, tmp_path: Path) -> None:
    report = replayed(tmp_path, url, "--top-n", "8", "--cache-share", "1")
    assert report["cache"]["lru_and_forecast"]["hit_rate"] == 1


def test_the_version_asked_for_answers(url: str, tmp_path: Path) -> None:
    assert replayed(tmp_path, url, "--model", "toy@1")["versions"] == [1]


def test_the_stream_remembers_what_rest_is_told_again(url: str, tmp_path: Path) -> None:
    everything = ["--rest", "--context-tokens", str(TOKENS)]
    assert replayed(tmp_path, url)["recall"] == replayed(tmp_path, url, *everything)["recall"]


def test_a_limit_ends_it_early(url: str, tmp_path: Path) -> None:
    assert replayed(tmp_path, url, "--limit", "3")["tokens"] == 3


def test_context_changes_what_is_forecast(url: str, tmp_path: Path) -> None:
    without, with_some = (
        replayed(tmp_path, url, "--rest", "--context-tokens", count)["recall"]["start"]
        for count in ("0", "4")
    )
    assert without != with_some


@pytest.mark.parametrize(
    "changes", [{"gates": False}, {"token_ids": False}], ids=["no gates", "no token ids"]
)
def test_a_trace_without_the_optional_parts_is_played(
    url: str, tmp_path: Path, changes: dict[str, bool]
) -> None:
    assert replayed(tmp_path, url, **changes)["answered"] == TOKENS


def test_an_interrupted_replay_prints_what_it_has(
    url: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Replay.play

    def interrupted_at_the_fourth(self: Replay, token: int, start: int) -> None:
        if token == 3:
            raise KeyboardInterrupt
        play(self, token, start)

    monkeypatch.setattr(Replay, "play", interrupted_at_the_fourth)
    assert replay(recording(tmp_path), url) == 130
    assert "3 tokens, interrupted" in capsys.readouterr().out


def test_unanswered_questions_are_counted_by_reason(tmp_path: Path, capsys: Any) -> None:
    models = {
        "models": [
            {
                "model": "toy",
                "ready": True,
                "version": 2,
                "reason": None,
                "spec": {"num_layers": 4, "num_experts": 8, "top_k": 2},
                "versions": [2],
                "aliases": {},
            }
        ]
    }
    with OddServer([answer(json.dumps(models).encode()), answer(b"{}")]) as server:
        assert replay(recording(tmp_path), server.url, "--rest", "--limit", "5") == 0
    printed = capsys.readouterr().out
    assert "unanswered     5 of 5 (5 invalid)" in printed
    assert "toy (version none), 5 tokens" in printed


REFUSED = {
    "an unknown model": (["--model", "toys"], "does not serve 'toys'; it serves toy"),
    "an unknown version": (["--model", "toy@9"], "toy has no version 9"),
    "an unknown alias": (["--model", "toy@best"], "toy has no alias 'best'"),
    "too small a cache": (["--cache-share", "0.01"], "one layer needs 2"),
    "too large a share": (["--cache-share", "1.5"], "expected above 0, up to 1"),
    "no URL": (["--url", "localhost"], "expected http://host:port"),
    "a socket that is not there": (["--uds", "none.sock"], "Check that the service runs"),
    "too many experts": (["--top-n", "9"], "9 experts of a layer"),
    "two sizes": (["--top-n", "3", "--coverage", "0.9"], "--top-n 3 and --coverage 0.9 came together"),
    "nothing that adapts": (["--adapt"], "--adapt is for coverage sets"),
    "nobody who adapts": (["--adapt", "--coverage", "0.9", "--rest"], "over the stream"),
    "a coverage beyond the tables": (["--coverage", "0.999"], "0.999"),
    "a coverage of one": (["--coverage", "1"], "Give a probability between 0 and 1"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the transport's socket that could not connect
@pytest.mark.parametrize(("flags", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_played_is_refused_with_the_reason(
    url: str, tmp_path: Path, capsys: Any, flags: list[str], words: str
) -> None:
    assert replay(recording(tmp_path), url, *flags) == 2
    assert words in capsys.readouterr().err
    gc.collect()  # here, where its warning is expected


def test_a_trace_of_another_model_is_refused(url: str, tmp_path: Path, capsys: Any) -> None:
    assert replay(recording(tmp_path, experts=16), url) == 2
    assert (
        "4 layers x 8 experts, top-2, the trace of toy has 4 layers x 16 experts" in capsys.readouterr().err
    )


def test_a_trace_that_is_not_there_is_refused(url: str, tmp_path: Path, capsys: Any) -> None:
    assert replay(tmp_path / "none.npz", url) == 2
    assert "none.npz does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--every", "-1"], ["--limit", "0"], ["--timeout-ms", "0"], ["--top-n", "x"]]
)
def test_flags_out_of_range_are_refused(tmp_path: Path, flags: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        replay(tmp_path, "http://127.0.0.1:1", *flags)
    assert flags[0] in capsys.readouterr().err


def test_without_the_client_it_says_what_to_install(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert replay(recording(tmp_path), "http://127.0.0.1:1") == 2
    assert "pip install ./clients/python" in capsys.readouterr().err
