"""What recording costs: a model alone, and `specmoe collect`'s whole work on the same batches, side by side.

    .venv/bin/python benchmarks/recording.py

The model is an OLMoE with random weights, small enough for a CPU; a larger one spends more time on each
token, the recorder the same. The two take turns on one thread, and what counts is the processor's time, which
other work on the machine disturbs least. Everything but loading the model counts as recording: reading and
tokenizing texts, finding routers, the hooks, checks, compression and the shards on disk.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import trange

from specmoe.bench.cores import Cores
from specmoe.bench.machine import describe
from training.collection.config import CollectConfig
from training.collection.model import Loaded
from training.collection.passes import padded
from training.collection.recording import collect
from training.collection.texts import Tokens, texts_of

BATCH_SIZE = 8
LENGTH, BATCHES = 256, 2
PROMPT, NEW_TOKENS = 32, 32
END = 256


def small_olmoe(hidden_size: int, layers: int) -> Loaded:
    """64 experts, top-8, as OLMoE-1B-7B has them, and a tokenizer of bytes."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=alphabet | {"</s>": END}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = transformers.OlmoeConfig(
        vocab_size=END + 1,
        hidden_size=hidden_size,
        intermediate_size=hidden_size // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        eos_token_id=None,
        pad_token_id=END,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise)
    tokenizer.pad_token_id = END
    return Loaded("olmoe", model, tokenizer, encoder_decoder=False)


@torch.inference_mode()
def run_alone(loaded: Loaded, config: CollectConfig) -> None:
    """What the model has to do anyway."""
    texts = list(texts_of(config.texts, Tokens(loaded.tokenizer, config.length), None))
    for start in range(0, len(texts), config.batch_size):
        batch = [text.token_ids for text in texts[start : start + config.batch_size]]
        ids, mask = padded(batch, loaded)
        if config.new_tokens:
            loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=config.new_tokens,
                do_sample=False,
                pad_token_id=loaded.pad_id,
            )
        else:
            loaded.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


def seconds(work: Callable[[], object]) -> float:
    """Of processor time, all threads together."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measured(loaded: Loaded, config: CollectConfig, turns: int) -> tuple[float, float, list[float]]:
    """Median seconds of the model alone and of recording it, and the share that recording adds, by turn."""
    alone, recorded = [], []
    for turn in trange(turns + 1, desc="turns", leave=False, disable=None):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "traces"
            both = [
                seconds(lambda: run_alone(loaded, config)),
                seconds(lambda out=out: collect(loaded, config, out)),
            ]
        if turn:  # the first one warms up
            alone.append(both[0])
            recorded.append(both[1])
    shares = [with_it / without - 1 for without, with_it in zip(alone, recorded, strict=True)]
    return statistics.median(alone), statistics.median(recorded), sorted(shares)


def configs(text: Path) -> Mapping[str, tuple[CollectConfig, int]]:
    """What is measured, and how many bytes of text it takes."""
    read = CollectConfig(texts=(text,), length=LENGTH, batch_size=BATCH_SIZE)
    generated = CollectConfig(texts=(text,), length=PROMPT, new_tokens=NEW_TOKENS, batch_size=BATCH_SIZE)
    hidden = CollectConfig(texts=(text,), length=LENGTH, batch_size=BATCH_SIZE, hidden=True)
    return {
        f"text, {LENGTH} tokens each": (read, BATCHES * BATCH_SIZE * LENGTH),
        f"{NEW_TOKENS} tokens generated behind {PROMPT}": (generated, BATCH_SIZE * PROMPT),
        "text, with hidden states": (hidden, BATCHES * BATCH_SIZE * LENGTH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What recording costs beside the model's own time.")
    parser.add_argument("--turns", type=int, default=5, metavar="N")
    parser.add_argument("--hidden-size", type=int, default=512, metavar="N")
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = small_olmoe(args.hidden_size, args.layers)
    weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    machine = describe(Cores(None, None))
    print(
        f"OLMoE, {args.layers} layers x 64 experts, top-8, {args.hidden_size} wide,"
        f" {weights / 1e6:.0f} M weights,"
        f" float32, batch {BATCH_SIZE}; {machine['cpu']}, one thread, Python {platform.python_version()},"
        f" torch {torch.__version__}, transformers {transformers.__version__}\n\n"
        "| | model alone, s | recorded, s | recording adds, median (least to most) |\n|---|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, size) in configs(Path(folder) / "text.txt").items():
            config.texts[0].write_text(("The sea is wide. " * size)[:size], encoding="utf-8")
            alone, recorded, shares = measured(loaded, config, args.turns)
            told = f"{statistics.median(shares):+.1%} ({shares[0]:+.1%} to {shares[-1]:+.1%})"
            print(f"| {name} | {alone:.2f} | {recorded:.2f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
