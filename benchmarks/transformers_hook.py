"""Whether forecasts are there before a model of transformers runs the layer they are for, and at what cost.

    .venv/bin/python benchmarks/transformers_hook.py

The reference model, and models of random weights with gpt-oss-20b's layers, experts and top-k, decode on one
thread, followed by a stream to a `specmoe serve` of its own that runs their bundled versions. A narrow model
runs a layer faster than any real one does; a wider one takes a millisecond or more for it. *Asleep*: before
its experts each layer sleeps, as a program does that waits for a device, and leaves the core to the service.
What random weights route is not what the version was trained on: this measures time, not accuracy.

*Arrived*: just before the layer's block ran, there was a forecast that was made after this token's start and
covers this layer. *Behind*: layers that had been routed by then and that it did not know of. *Added*:
processor time of the program that runs the model, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from specmoe_client import Stream, UnionForecast
from specmoe_client.integrations.transformers import attach
from tqdm import tqdm

from specmoe.bench.cores import Cores
from specmoe.bench.machine import describe
from specmoe.bench.processes import server

REFERENCE = Path(__file__).parents[1] / "reference_moe" / "checkpoint"
LAYERS, EXPERTS, TOP_K = 24, 32, 4
PROMPT, NEW_TOKENS = 16, 33


@dataclass(frozen=True)
class Followed:
    """A model that is measured. hidden_size: None for the reference model; asleep_ms: of each layer."""

    title: str
    version: str
    hidden_size: int | None
    asleep_ms: float

    def model(self) -> Any:
        """Built or loaded, and made to sleep."""
        if self.hidden_size is None:
            made = transformers.AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
        else:
            made = random_model(self.hidden_size)
        if self.asleep_ms:
            for layer in made.model.layers:
                layer.mlp.experts.register_forward_pre_hook(lambda *_: time.sleep(self.asleep_ms / 1000))
        return made


ALL = (
    Followed("reference", "reference-moe", None, 0),
    Followed("reference", "reference-moe", None, 1),
    Followed("64 wide", "gpt-oss-20b", 64, 0),
    Followed("64 wide", "gpt-oss-20b", 64, 1),
    Followed("512 wide", "gpt-oss-20b", 512, 0),
)


@dataclass
class Arrivals:
    """What was in hand before each layer, of several passes.

    start, later: whether it had arrived, at layer 0 and from 1 on. behind: layers that it did not know of.
    """

    start: list[bool] = field(default_factory=list)
    later: list[bool] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)

    def note(self, layer: int, forecast: UnionForecast | None) -> None:
        """The callback of `attach`."""
        arrived = forecast is not None and len(forecast.experts_of(layer)) > 0
        (self.later if layer else self.start).append(arrived)
        if layer and arrived and forecast is not None:
            self.behind.append(layer - forecast.seen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Forecasts before their layer, and what the hook costs.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--turns", type=int, default=10, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{describe(Cores(None, None))['cpu']}, one thread, Python {platform.python_version()}, torch"
        f" {torch.__version__}, transformers {transformers.__version__}; float32;"
        f" {args.turns} turns of {NEW_TOKENS - 1} decoded tokens, load average"
        f" {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n\n"
        "| model | asleep, ms | rows | a layer alone, ms | with the hook, ms | added, µs of processor"
        " | arrived, all layers but the first: median of turns (least to most) | layer 0 | behind, mean |\n"
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for followed in ALL:
        model = followed.model()
        with serving(followed.version) as reached:
            for rows in args.batch_sizes:
                cells = measured(model, rows, args.turns, reached)
                print(f"| {followed.title} | {followed.asleep_ms} | {rows} | {cells} |", flush=True)


@contextmanager
def serving(version: str) -> Iterator[dict[str, Any]]:
    """How to reach a service of a bundled model's version, which runs until the block ends."""
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s"
        flags = ["serve", "--uds", str(socket), "--models", version, "--provider", "cpu"]
        with server("specmoe.cli", flags, ready="model ready", log=Path(folder) / "service.log"):
            yield {"uds": str(socket), "model": version}


def random_model(hidden_size: int) -> Any:
    """Experts half as wide as the model; it never ends a text."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        moe_intermediate_size=hidden_size // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def measured(model: Any, rows: int, turns: int, reached: dict[str, Any]) -> str:
    """Cells of a row of the table. Alone and followed take turns; the first ones warm up."""
    alone, followed, shares, start, behind = [], [], [], [], []
    layers = model.config.num_hidden_layers
    with Stream(**reached, union=True, per_sequence=False) as stream:
        for turn in tqdm(range(turns + 1), leave=False, disable=None):
            plain = layer_ms(model, rows, turn)
            told = Arrivals()
            with attach(model, stream, told.note) as hook:
                hooked = layer_ms(model, rows, turn)
                if hook.last_error is not None:
                    raise hook.last_error
            if turn:
                alone.append(plain)
                followed.append(hooked)
                # The prompt's pass comes first, and has no forecasts.
                start += told.start[1:]
                shares.append(statistics.mean(told.later[layers - 1 :]))
                behind += told.behind
    added = statistics.median((of[1] - plain[1]) * 1000 for of, plain in zip(followed, alone, strict=True))
    return (
        f"{statistics.median(wall for wall, _ in alone):.2f}"
        f" | {statistics.median(wall for wall, _ in followed):.2f} | {added:.0f}"
        f" | {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
        f" | {statistics.mean(start):.0%} | {statistics.mean(behind):.1f}"
    )


@torch.inference_mode()
def layer_ms(model: Any, rows: int, seed: int) -> tuple[float, float]:
    """Time of a decoded token, by layer: by the clock, and of the processor."""
    prompt = torch.randint(1, 1024, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))
    output = model(prompt, use_cache=True)
    begin = time.perf_counter(), time.process_time()
    for _ in range(NEW_TOKENS - 1):
        output = model(output.logits[:, -1:].argmax(-1), use_cache=True, **cached(output))
    end = time.perf_counter(), time.process_time()
    layers = model.config.num_hidden_layers
    wall, processor = (
        (till - since) * 1000 / (NEW_TOKENS - 1) / layers for since, till in zip(begin, end, strict=True)
    )
    return wall, processor


def cached(output: Any) -> dict[str, Any]:
    """What was read so far, under the name that this version of transformers has for it."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


if __name__ == "__main__":
    main()
