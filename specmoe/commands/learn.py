"""From a mixture-of-experts model of transformers to a predictor that is served, in one command.

    specmoe learn ./my-model --text novel.txt law.txt --folder runs/mine --serve
    specmoe learn allenai/OLMoE-1B-7B-0924 --prompts prompts.jsonl --generate 256 --folder runs/olmoe

Runs, and shows before it does: collect, traces split, train, evaluate, and with --serve, serve. Everything
goes into --folder. Interrupted, the same command with --resume goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from specmoe.learning import Learning, State

RECORDING = ("generate", "tokens", "length", "batch_size", "name", "domain", "device", "dtype")
# May differ when it goes on.
FREE = ("resume", "serve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from training.presets import DEFAULT, PRESETS

    parser.add_argument("model", metavar="MODEL", help="a folder with model and tokenizer, or a hub's name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="FILE", help="running text in UTF-8, cut into pieces")
    source.add_argument("--prompts", metavar="FILE", help="a prompt on each line, or .jsonl")
    parser.add_argument("--folder", type=Path, required=True, help="new or empty, unless --resume")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --folder")
    parser.add_argument("--serve", action="store_true", help="serve the predictor at the end, on loopback")
    parser.add_argument("--store", help="where to publish: a folder or s3://bucket/prefix (FOLDER/store)")
    parser.add_argument("--alias", default="production", help="alias to move to the new version (production)")
    recording = parser.add_argument_group("recording", "As of specmoe collect.")
    for option, kind in (("generate", "N"), ("tokens", "N"), ("length", "N"), ("batch-size", "N")):
        recording.add_argument(f"--{option}", type=int, metavar=kind)
    for option in ("name", "domain", "device", "dtype"):
        recording.add_argument(f"--{option}", metavar=option.upper())
    training = parser.add_argument_group("training", "As of specmoe train, which has many more.")
    training.add_argument("--predictor", choices=PRESETS, default=DEFAULT, help="which; default: %(default)s")
    training.add_argument("--passes", type=int, metavar="N", help="over the training tokens")


def run(args: argparse.Namespace) -> int:
    """Run all that is not done yet, then serve where asked to. Returns the status of what failed, or 0."""
    from specmoe.cli import main

    learning = _learning(args)
    options = {name: str(value) for name, value in vars(args).items() if name not in FREE}
    state = State(args.folder, options, resume=args.resume)
    for words in learning.commands():
        if words in state.done:
            continue
        command = state.begin(words)
        print(f"specmoe: {shlex.join(['specmoe', *command])}", file=sys.stderr)
        if status := main(command):
            if state.kept:
                print(f"specmoe: what is done is kept in {args.folder}; --resume goes on.", file=sys.stderr)
            return status
        state.end()
    if args.serve:
        _serve(learning.store)
    print(f"Next: {shlex.join(['specmoe', 'serve', '--store', learning.store])}")
    return 0


def _learning(args: argparse.Namespace) -> Learning:
    """Raises ConfigInvalid where what comes after hours of recording could not be done."""
    from model_store.documents import check_alias
    from training.presets import PRESETS

    check_alias(args.alias)
    if args.passes is not None:
        replace(PRESETS[args.predictor].train, passes=args.passes)
    given = vars(args)
    source = ["--text", *args.text] if args.text else ["--prompts", args.prompts]
    options = [(f"--{name.replace('_', '-')}", given[name]) for name in RECORDING]
    return Learning(
        model=args.model,
        folder=args.folder,
        store=args.store or str(args.folder / "store"),
        alias=args.alias,
        recording=(*source, *_told(options)),
        training=_told([("--predictor", args.predictor), ("--passes", args.passes)]),
    )


def _told(options: list[tuple[str, object]]) -> tuple[str, ...]:
    return tuple(word for flag, value in options if value is not None for word in (flag, str(value)))


def _serve(store: str) -> NoReturn:
    """Become the service, which needs nothing of what is loaded here."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "specmoe.cli", "serve", "--store", store])  # noqa: S606  # ours
