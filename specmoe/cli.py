"""The `specmoe` command: one table of subcommands, each imported only when it runs.

specmoe --help
specmoe SUBCOMMAND --help
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from traces.errors import SpecMoEError

SUBCOMMANDS = {
    "serve": "run the prediction service",
    "traces": "import routing traces and tell how predictable they are",
    "learn": "from a model of transformers to a predictor that is served, in one command",
    "collect": "record the routing of a mixture-of-experts model of transformers",
    "reference-moe": "train our own small mixture-of-experts language model on plain text",
    "train": "train a predictor from routing traces",
    "refit": "train once more, on the validation traces, too",
    "export": "turn a training run into ONNX graphs and a manifest",
    "outlook": "train what tells a cache which experts to keep",
    "publish": "put an exported predictor into a store as a new version",
    "compare": "train and score every approach on the same splits, into one report",
    "evaluate": "score a version, as it would be served, on traces",
    "store": "list, show, verify versions and move aliases",
    "replay": "play a trace through a running service, as a model server would",
    "bench": "measure model time and the service's latency on this machine",
}

# The extra that brings a module which a subcommand may find missing.
EXTRA_OF_MODULE = {
    "torch": "training",
    "onnx": "training",
    "onnxscript": "training",
    "matplotlib": "training",
    "tensorboard": "training",
    "transformers": "collect",
    "tokenizers": "collect",
    "safetensors": "collect",
    "pyarrow": "traces",
    "tqdm": "traces",
    "boto3": "s3",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns the exit status: 0 done, 1 it failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _front_parser()
    name = parser.parse_args(arguments[:1]).subcommand
    try:
        return _run(name, arguments[1:])
    except SpecMoEError as error:
        print(f"specmoe: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(
            f"specmoe {name} needs {error.name}. Install it from the repository: pip install '.[{extra}]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("specmoe: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, say) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _front_parser() -> argparse.ArgumentParser:
    width = max(map(len, SUBCOMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="specmoe",
        description=f"Which experts will a mixture-of-experts model need next?\n\n{listing}",
        epilog="specmoe SUBCOMMAND --help tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subcommand", choices=SUBCOMMANDS, metavar="SUBCOMMAND", help="one of the above")
    return parser


def _run(name: str, arguments: list[str]) -> int:
    command = importlib.import_module(f"specmoe.commands.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"specmoe {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    result: int = command.run(parser.parse_args(arguments))
    sys.stdout.flush()
    return result


if __name__ == "__main__":
    sys.exit(main())
