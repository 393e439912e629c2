"""Record the routing of a mixture-of-experts model of transformers, on text or prompts, into Parquet shards.

    specmoe collect allenai/OLMoE-1B-7B-0924 --text novel.txt law.txt --out traces/
    specmoe collect ./my-model --prompts prompts.jsonl --generate 256 --out traces/ --tokens 200000

Ctrl-C leaves whole shards; the same command with --resume goes on behind them. Traces reveal the text they
were recorded from. docs/collecting.md is the guide.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from traces.errors import TraceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a folder with model and tokenizer, or a name on the hub"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", type=Path, nargs="+", metavar="FILE", help="running text in UTF-8, cut into pieces"
    )
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt on each line, or .jsonl")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new or empty, unless --resume"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the recording in --out")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="tokens to generate behind each")
    parser.add_argument("--tokens", type=int, metavar="N", help="stop after so many recorded tokens")
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a piece of text, of a prompt at most; 512, or what the model can read",
    )
    parser.add_argument("--domain", metavar="NAME", help="of everything; default: each file's name")
    parser.add_argument(
        "--name", metavar="NAME", help="what to call the model in the traces; default: its own"
    )
    parser.add_argument(
        "--hidden", action="store_true", help="record the routers' input, too, in half precision"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="sequences side by side; default 8"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: as saved"
    )


def run(args: argparse.Namespace) -> int:
    from training.collection.config import USUAL_LENGTH, CollectConfig
    from training.collection.model import load
    from training.collection.recording import check_folder, collect, usual_length

    config = CollectConfig(
        texts=tuple(args.text or ()),
        prompts=args.prompts,
        domain=args.domain,
        length=USUAL_LENGTH if args.length is None else args.length,
        new_tokens=args.generate,
        tokens=args.tokens,
        batch_size=args.batch_size,
        hidden=args.hidden,
    )
    check_folder(args.out, resume=args.resume)
    loaded = load(args.model, device=args.device, dtype=args.dtype)
    if args.length is None:
        config = replace(config, length=usual_length(loaded, config.new_tokens))
    try:
        collected = collect(loaded, config, args.out, name=args.name, resume=args.resume)
    except OSError as error:
        raise TraceError(
            f"{error.filename or args.out} cannot be read or written: {error.strerror or error}.",
            remedy="Check permissions and free space, then go on with --resume.",
        ) from error
    for of in collected:
        print(
            f"{of.folder}: {of.tokens:,} tokens of {of.sequences:,} sequences, {of.spec.num_layers} layers x"
            f" {of.spec.num_experts} experts, top-{of.spec.top_k}, of {of.spec.model}."
        )
    return 0
