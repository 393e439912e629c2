"""Train a predictor from routing traces.

Everything goes into the --run folder: checkpoint, TensorBoard events, the record of what was asked for. With
--publish the run is also exported, checked and put into a store. Several processes: torchrun
--nproc-per-node N -m specmoe.cli train ...
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `specmoe train`: files, and every knob of the two configurations."""
    from training.config import PrefixConfig, TrainConfig

    parser.add_argument("--traces", type=Path, nargs="+", required=True, help="training traces")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="validation traces")
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--model", help="name to publish under; default: the traces' own")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--publish", action="store_true", help="export and publish at the end")
    parser.add_argument("--store", help="where to publish: a folder or s3://bucket/prefix")
    parser.add_argument("--alias", action="append", default=[], help="alias to move to the new version")
    for config in (TrainConfig, PrefixConfig):
        add_fields(parser.add_argument_group(config.__name__), config)


def run(args: argparse.Namespace) -> int:
    """Train, and export and publish where asked to. Returns 0."""
    from training.config import PrefixConfig, TrainConfig
    from training.errors import ConfigInvalid
    from training.pipeline import train

    if args.publish and not args.store:
        raise ConfigInvalid("--publish has no --store.", remedy="Say where to publish: --store FOLDER.")
    train(
        traces=tuple(args.traces),
        validation=tuple(args.validation),
        folder=args.run,
        model=args.model,
        train_config=config_of(TrainConfig, args),
        predictor_config=config_of(PrefixConfig, args),
        command=told(sys.argv[1:]),
        resume=args.resume,
        store=args.store if args.publish else None,
        aliases=tuple(args.alias),
    )
    return 0


def told(arguments: list[str]) -> str:
    """The command as the lineage tells it: files by name, since folders are this machine's own business."""
    return shlex.join(["specmoe", *(Path(a).name if "/" in a and "://" not in a else a for a in arguments)])


def add_fields(group: Any, config: type[Any]) -> None:
    helps = dict(line.strip().split(": ", 1) for line in (config.__doc__ or "").splitlines() if ": " in line)
    for field in fields(config):
        default = field.default
        kind = type(default[0]) if isinstance(default, tuple) else type(default)
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            nargs="+" if isinstance(default, tuple) else None,
            default=default,
            metavar=kind.__name__.upper(),
            help=f"{helps[field.name]} Default: {default}.".replace("%", "%%"),
        )


def config_of(kind: type[Any], args: argparse.Namespace) -> Any:
    values = {field.name: getattr(args, field.name) for field in fields(kind)}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
