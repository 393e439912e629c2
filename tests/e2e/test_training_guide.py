"""docs/training-guide.md: its commands are run in order on a small recording, its errors are provoked."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model_store.store import open_store
from specmoe.cli import main
from tests.contract.running import running_service
from tests.training.toy_routing import toy_trace
from tests.training.toy_run import save_npz
from traces.files import load
from traces.spec import RoutingSpec

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "training-guide.md").read_text(encoding="utf-8")
SPEC = RoutingSpec("my-model", 4, 8, 2)
# What keeps a command to seconds here.
SMALL = {
    "train": "--width 16 --hidden 32 --decays 0 0.8 --window 24 --earlier-width 8 --token-width 4"
    " --batch-tokens 32 --passes 2 --warmup-steps 2",
    "outlook": "--steps 5 --tokens 2",
}
# Looks at what is there, for as long as a person wants to.
ENDLESS = "tensorboard --logdir runs"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def shown() -> list[str]:
    """Every command of the guide, one a line."""
    return [line for block in blocks("sh") for line in block.splitlines()]


class Reader:
    """Does what the guide says, in the present folder. done: the status of each command."""

    def __init__(self, captured: contextlib.ExitStack) -> None:
        self.until_the_end, self.url = captured, ""
        self.done: dict[str, int] = {}

    def follow(self, line: str) -> None:
        program, *words = shlex.split(line)
        if program == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *words, *SMALL["train"].split()]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            self.done[line] = subprocess.run(command, env=environment, capture_output=True).returncode
        elif words[0] == "serve":
            store = Path(words[words.index("--store") + 1]).resolve()
            self.url = self.until_the_end.enter_context(running_service(store))["base_url"]
            self.done[line] = 0
        else:
            words += SMALL.get(words[0], "").split()
            self.done[line] = main(words + (["--url", self.url] if words[0] == "replay" else []))


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, int]]]:
    """The folder of somebody who has followed the guide to its end, and the status of every command."""
    folder = tmp_path_factory.mktemp("guide")
    save_npz(toy_trace((17, 9, 20, 12, 15) * 6, spec=SPEC, seed=1), folder / "recording.npz")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as until_the_end:
        patch.chdir(folder)
        reader = Reader(until_the_end)
        for line in shown():
            if line != ENDLESS:
                reader.follow(line)
        yield folder, reader.done


def test_every_command_succeeds(followed: tuple[Path, dict[str, int]]) -> None:
    done = followed[1]
    assert ENDLESS in shown() and set(done) == {*shown()} - {ENDLESS}
    assert {line: status for line, status in done.items() if status} == {}


def test_splits_are_whole_sequences_that_none_shares(followed: tuple[Path, dict[str, int]]) -> None:
    folder, _ = followed
    recording = load(folder / "recording.npz")
    parts = [load(folder / "parts" / name) for name in ("train", "validation", "test")]
    sequences = [
        part.experts[start:end].tobytes()
        for part in parts
        for start, end in zip(part.starts[:-1], part.starts[1:], strict=True)
    ]
    assert [part.num_tokens for part in parts] == [346, 51, 41]
    assert len(set(sequences)) == recording.num_sequences == len(sequences) == 30


def test_versions_and_aliases_are_where_the_guide_leaves_them(followed: tuple[Path, dict[str, int]]) -> None:
    store = open_store(followed[0] / "store")
    assert store.aliases("my-model") == {"candidate": 4, "production": 1}
    assert [store.manifest("my-model", number).lineage.refit for number in (1, 3)] == [False, True]
    assert store.manifest("my-model", 4).outlook is not None
    assert store.aliases("my-model-tuned") == {"production": 1}


def test_reports_are_written(followed: tuple[Path, dict[str, int]]) -> None:
    folder, _ = followed
    report = (folder / "report" / "report.md").read_text()
    assert all(f"## {title}" in report for title in ("By domain", "Without token ids", "Without gates"))
    assert (folder / "compared-quickly" / "report.md").exists()


def test_the_curves_that_the_guide_names_are_there(followed: tuple[Path, dict[str, int]]) -> None:
    events = EventAccumulator(str(followed[0] / "runs" / "first"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert len(tags) == 4 and all(f"`{tag}`" in GUIDE for tag in tags)


def test_every_link_leads_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", GUIDE, re.MULTILINE)
    }
    for page, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^):]+)\)", GUIDE)):
        assert (ROOT / "docs" / page).exists() and (page or anchor in anchors), (page, anchor)


def npz(folder: Path, name: str, **replaced: Any) -> None:
    """A trace of the guide's model with some arrays replaced, or left out where None."""
    path = save_npz(toy_trace((17, 9, 20), spec=SPEC, seed=len(name)), folder / f"{name}.npz")
    with np.load(path) as archive:
        arrays = {**archive, **replaced}
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})


@pytest.fixture(scope="module")
def clumsy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings that have something wrong, one good one, and a run that has just begun."""
    folder = tmp_path_factory.mktemp("clumsy")
    trace = toy_trace((17, 9, 20), spec=SPEC, seed=3)
    outside, twice, gates = trace.experts.copy(), trace.experts.copy(), trace.gates
    assert gates is not None
    outside[3, 1, 0], twice[3, 1] = 8, 2
    bad = {
        "good": {},
        "validation": {},
        "nameless": {"model": None},
        "other-names": {"starts": None},
        "outside": {"experts": outside},
        "twice": {"experts": twice},
        "short": {"starts": trace.starts[:-1], "domains": None},
        "empty": {"starts": np.array([0, 9, 9, 46])},
        "nan": {"gates": np.full_like(gates, np.nan)},
        "no-gates": {"gates": None},
    }
    for name, replaced in bad.items():
        npz(folder, name, **replaced)
    save_npz(toy_trace((9,), spec=RoutingSpec("other", 4, 16, 2)), folder / "other.npz")
    (folder / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        files = "--traces good.npz --validation validation.npz"
        assert main(f"train {files} --run begun {SMALL['train']}".split()) == 0
        (folder / "begun" / "checkpoint.pt").unlink()
    return folder


TRAIN = "train --traces good.npz --validation validation.npz"
MISTAKES = {
    "… does not name its model.": "traces info nameless.npz",
    "… missing, expected experts, starts, num_experts.": "traces info other-names.npz",
    "expert id is …, expected 0 to …": "traces info outside.npz",
    "expert … is routed twice among the top …": "traces info twice.npz",
    "starts goes from … to …, expected 0 to …": "traces info short.npz",
    "sequence … is empty": "traces info empty.npz",
    "gate is nan, expected a finite number": "traces info nan.npz",
    "Some of the traces have gates and others have none.": "train --traces good.npz no-gates.npz"
    " --validation validation.npz --run runs/a",
    "No baselines: they are fitted and scored on whole sequences, 5 at least": "traces info good.npz",
    "Different sequences to share out: …, expected … at least": "traces split good.npz --out p --test 0.2"
    " --hold-out maths",
    "… is given for validation, and the same recording, as …, for training.": "train --traces good.npz"
    " --validation good.npz --run runs/a",
    "The trace of … has num_experts …, expected … as in …": "train --traces good.npz --validation other.npz"
    " --run runs/a",
    "… already holds a run.": f"{TRAIN} --run begun",
    "… was started with other train config: seed 0, now 3.": f"{TRAIN} --run begun --resume --seed 3"
    f" {SMALL['train']}",
    "… holds no run: there is no run.json.": f"{TRAIN} --run runs/none --resume",
    "--… is given, but … has no such knob.": f"{TRAIN} --run runs/a --memory 3",
    "batch_tokens is …, expected a multiple of block_tokens": f"{TRAIN} --run runs/a --batch-tokens 30",
    "--publish has no --store.": f"{TRAIN} --run runs/a --publish",
    "--store and --alias are given without --publish.": f"{TRAIN} --run runs/a --alias production",
    "The loss became nan": f"{TRAIN} --run runs/nan {SMALL['train']} --learning-rate 0.9 --weight-decay 9e9",
    "--baselines and --train-traces came without each other.": "evaluate gpt-oss-20b --traces good.npz"
    " --baselines",
    "No version of … in …. It holds: …": "evaluate my-model --traces good.npz",
    "… has no version …. Choose one of …": "evaluate gpt-oss-20b@99 --traces good.npz",
    "There is no store at …": "store list --store nowhere",
    "'…' is no location on S3.": f"{TRAIN} --run runs/a --publish --store s3://x/y",
    "…/draft.json is missing.": "publish begun --store store",
    "'…' cannot be an alias.": f"{TRAIN} --run runs/a --publish --store store --alias 5",
    "The connection failed (ConnectError: …)": "replay good.npz --model my-model --url http://127.0.0.1:9",
    "… is given for test, and the same file for …": "compare --traces good.npz --validation validation.npz"
    " --test validation.npz --folder compared",
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_the_message_of_the_table(
    clumsy: Path, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"`{message}`" in GUIDE.partition("## 10. Troubleshooting\n")[2]
    monkeypatch.chdir(clumsy)
    main(MISTAKES[message].split())
    printed = capsys.readouterr()
    assert re.search(".+".join(map(re.escape, message.split("…"))), printed.err + printed.out)
