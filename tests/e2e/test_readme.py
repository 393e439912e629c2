"""The README's examples are run as they stand, on the bundled versions; its answers are the service's."""

import contextlib
import json
import re
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from model_store.store import open_store
from specmoe.cli import main
from tests.contract.running import running_service
from traces.spec import RoutingSpec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BUNDLED = ROOT / "model_store" / "bundled"
MAX_BYTES = 12_000_000


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def wait_until_ready(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{url}/readyz"):
            return
        time.sleep(0.1)
    raise TimeoutError(url)


def test_the_curl_example_gets_the_answer_that_is_shown() -> None:
    (curl,) = (block for block in blocks("sh") if block.startswith("curl"))
    with running_service(BUNDLED) as reached:
        wait_until_ready(reached["base_url"])
        command = shlex.split(curl.replace("http://127.0.0.1:8080", reached["base_url"]).replace("\\\n", " "))
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    shown = json.loads(blocks("json")[0])
    assert answer.keys() == shown.keys() and answer["version"] == shown["version"]
    for came, expected in zip(answer["predictions"][0], shown["predictions"][0], strict=True):
        assert came["experts"] == expected["experts"]
        assert came["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-2)


def executed(example: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_the_example_of_a_decode_loop_runs_and_gets_forecasts() -> None:
    (example,) = (block for block in blocks("python") if "Stream(" in block)
    with running_service(BUNDLED) as reached:
        wait_until_ready(reached["base_url"])
        patient = example.replace("stream.latest(sequence)", "stream.wait(sequence, timeout_ms=5000)")
        names = executed(patient.replace("http://127.0.0.1:8080", reached["base_url"]))
        assert names["forecast"] is not None
        assert executed(example.replace("http://127.0.0.1:8080", reached["base_url"]))["layer"] == 23


def test_the_example_in_process_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block for block in blocks("python") if "load_speculator" in block)
    names = executed(example)
    assert capsys.readouterr().out.count("\n") == 2
    assert getattr(names["probabilities"], "shape", None) == (32, 24, 32)


def test_the_one_command_leads_from_the_reference_model_to_a_service_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = (line for block in blocks("sh") for line in block.splitlines() if "specmoe learn" in line)
    words = shlex.split(line.partition("specmoe learn")[2])
    assert words[-1] == "--serve"
    folder = words.index("--folder") + 1
    words[folder] = str(tmp_path / "learnt")
    texts = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
    words[words.index("docs/*.md")] = texts[0]
    words[words.index(texts[0]) + 1 : words.index(texts[0]) + 1] = texts[1:]
    monkeypatch.chdir(ROOT)
    small = ["--tokens", "6000", "--passes", "1"]
    assert main(["learn", *words[:-1], *small]) == 0
    with running_service(tmp_path / "learnt" / "store") as reached:
        wait_until_ready(reached["base_url"])
        question = json.dumps({"model": "reference", "sequences": [{"token_id": 99}], "top_n": 4}).encode()
        request = urllib.request.Request(f"{reached['base_url']}/v1/predict", question)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as told:
            (layers,) = json.load(told)["predictions"]
    assert [len(set(layer["experts"])) for layer in layers] == [4] * 8


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_every_subcommand_named_exists() -> None:
    named = set(re.findall(r"specmoe (\w+) ", " ".join(blocks("sh"))))
    assert {"traces", "train", "evaluate", "serve", "replay"} <= named
    for name in named:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])


@pytest.mark.parametrize(
    "spec",
    [
        RoutingSpec("gpt-oss-20b", 24, 32, 4),
        RoutingSpec("deepseek-v2-lite", 26, 64, 6),
        RoutingSpec("reference-moe", 8, 32, 4),
    ],
    ids=lambda spec: spec.model,
)
def test_bundled_versions_are_whole_small_and_trained_without_the_test_split(spec: RoutingSpec) -> None:
    store = open_store(None)
    manifest = store.load(spec.model, store.resolve(spec.model, "production")).manifest
    assert manifest.spec == spec
    assert sum(file.bytes for file in manifest.files.values()) <= MAX_BYTES
    assert {source.name for source in manifest.lineage.traces} <= {
        "train.npz",
        "train-repetitive.npz",
        "validation.npz",
        "train",
        "validation",
    }
