"""Train a predictor from routing traces.

Everything goes into the --run folder: checkpoint, TensorBoard events, the record of what was asked for. With
--publish the run is also exported, checked and put into a store. Several processes: torchrun
--nproc-per-node N -m -- specmoe.cli train ...

Knobs that are not given are as --predictor has them; docs/training-guide.md tells what they are for.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `specmoe train`: files, and every knob of training and of the predictors."""
    from training.presets import DEFAULT, PRESETS

    parser.add_argument("--traces", type=Path, nargs="+", required=True, help="training traces")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="validation traces")
    parser.add_argument("--model", help="name to publish under; default: the traces' own")
    add_ending(parser)
    parser.add_argument("--predictor", choices=PRESETS, default=DEFAULT, help="which; default: %(default)s")
    add_knobs(parser.add_argument_group("training"), {name: preset.train for name, preset in PRESETS.items()})
    add_knobs(
        parser.add_argument_group("the predictor's size", "Each has its own knobs, and its own defaults."),
        {name: preset.config for name, preset in PRESETS.items()},
    )


def run(args: argparse.Namespace) -> int:
    """Train, and export and publish where asked to. Returns 0."""
    from training.pipeline import train
    from training.presets import PRESETS

    check_ending(args)
    preset = PRESETS[args.predictor]
    _refuse_others(args, preset.train, preset.config)
    train(
        traces=tuple(args.traces),
        validation=tuple(args.validation),
        folder=args.run,
        model=args.model,
        train_config=with_knobs(preset.train, args),
        predictor=args.predictor,
        predictor_config=with_knobs(preset.config, args),
        command=told(sys.argv[1:]),
        resume=args.resume,
        store=args.store if args.publish else None,
        aliases=tuple(args.alias),
    )
    return 0


def add_ending(parser: argparse.ArgumentParser) -> None:
    """Where a run goes, and what becomes of it."""
    parser.add_argument("--run", type=Path, required=True, help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument("--publish", action="store_true", help="export and publish at the end")
    parser.add_argument("--store", help="where to publish: a folder or s3://bucket/prefix")
    parser.add_argument("--alias", action="append", default=[], help="alias to move to the new version")


def check_ending(args: argparse.Namespace) -> None:
    """Raises ConfigInvalid where it is not said, or said in vain, where to publish."""
    from training.errors import ConfigInvalid

    if args.publish and not args.store:
        raise ConfigInvalid("--publish has no --store.", remedy="Say where to publish: --store FOLDER.")
    if (args.store or args.alias) and not args.publish:
        raise ConfigInvalid(
            "--store and --alias are given without --publish.",
            remedy="Give --publish as well, or leave them out and run specmoe export and publish later.",
        )


def told(arguments: list[str]) -> str:
    """The command as the lineage tells it: files by name, since folders are this machine's own business."""
    return shlex.join(["specmoe", *(Path(a).name if "/" in a and "://" not in a else a for a in arguments)])


@dataclass(frozen=True)
class Knob:
    """A field of a config as an option. name: those of a part of a config begin with the part's."""

    name: str
    meaning: str
    default: Any

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def knobs(config: Any, part: str = "") -> Iterator[Knob]:
    """Every field of a config, and of the configs in it, with its meaning from the docstring."""
    meanings = dict(
        line.strip().split(": ", 1) for line in (config.__doc__ or "").splitlines() if ": " in line
    )
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from knobs(value, f"{part}{field.name}_")
        else:
            yield Knob(part + field.name, meanings[field.name].removesuffix("."), value)


def add_knobs(group: Any, configs: Mapping[str, Any]) -> None:
    """One option for all configs that have a knob of that name. configs: by predictor."""
    by_name: dict[str, dict[str, Knob]] = {}
    for predictor, config in configs.items():
        for knob in knobs(config):
            by_name.setdefault(knob.name, {})[predictor] = knob
    for having in by_name.values():
        knob = next(iter(having.values()))
        several = isinstance(knob.default, tuple)
        kind = type(knob.default[0] if several else knob.default)
        group.add_argument(
            knob.flag,
            type=kind,
            nargs="+" if several else None,
            default=argparse.SUPPRESS,
            metavar=kind.__name__.upper(),
            help=_help(having, everywhere=len(having) == len(configs)).replace("%", "%%"),
        )


def _help(having: Mapping[str, Knob], everywhere: bool) -> str:
    """What the knob means, and its default, for each predictor that has it."""
    predictors: dict[tuple[str, str], list[str]] = {}
    for predictor, knob in having.items():
        predictors.setdefault((knob.meaning, str(knob.default)), []).append(predictor)
    told = ""
    for (meaning, default), names in predictors.items():
        meant = "" if meaning in told else f"{meaning}. "
        whose = "Default" if everywhere and len(predictors) == 1 else ", ".join(names)
        told += f"{meant}{whose}: {default}. "
    return told.strip()


def _refuse_others(args: argparse.Namespace, *configs: Any) -> None:
    """Raises ConfigInvalid for a knob that the chosen predictor does not have."""
    from training.errors import ConfigInvalid
    from training.presets import PRESETS

    own = {knob.name for config in configs for knob in knobs(config)}
    for preset in PRESETS.values():
        for knob in knobs(preset.config):
            if knob.name not in own and hasattr(args, knob.name):
                raise ConfigInvalid(
                    f"{knob.flag} is given, but {args.predictor} has no such knob.",
                    remedy="Leave it out, or choose another --predictor; --help tells whose it is.",
                )


def with_knobs(config: Any, args: argparse.Namespace, part: str = "") -> Any:
    """The config with the knobs that were given."""
    changes: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            changes[field.name] = with_knobs(value, args, f"{part}{field.name}_")
        elif (given := getattr(args, part + field.name, None)) is not None:
            changes[field.name] = tuple(given) if isinstance(given, list) else given
    return replace(config, **changes)
