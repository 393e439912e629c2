"""The client's README is run as it stands, against a service with a model of gpt-oss-20b's shape."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model_store.store import open_store
from tests.contract.running import running_service
from tests.toy_version import toy_version
from tests.training.toy_models import SIZES, tokenizer
from traces.spec import RoutingSpec

README = Path(__file__).parents[2] / "clients" / "python" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
SPEC = RoutingSpec(model="gpt-oss-20b", num_layers=24, num_experts=32, top_k=4)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("readme")
    open_store(root).publish(*toy_version(SPEC))
    with running_service(root) as reached:
        yield reached["base_url"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow gpt-oss with the layers, experts and top-k of the 20b one."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    torch.manual_seed(0)
    sizes = SIZES | {
        "num_hidden_layers": SPEC.num_layers,
        "num_local_experts": SPEC.num_experts,
        "num_experts_per_tok": SPEC.top_k,
    }
    model = transformers.AutoModelForCausalLM.from_config(transformers.GptOssConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=["sync", "async", "stream", "async stream", "transformers"])
def test_an_example_of_the_readme_runs_and_gets_a_prediction(
    example: str, url: str, checkpoint: Path, capsys: Any
) -> None:
    # The deadline of the examples is for a machine that does nothing else.
    code = example.replace("http://127.0.0.1:8080", url).replace("timeout_ms=5", "timeout_ms=10_000")
    code = code.replace("openai/gpt-oss-20b", str(checkpoint))
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "without" not in printed
    assert "None" not in printed
    assert printed
