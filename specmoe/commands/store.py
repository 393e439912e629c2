"""List, show and verify versions, and move aliases.

    specmoe store list
    specmoe store show gpt-oss-20b production
    specmoe store verify --store s3://models/specmoe
    specmoe store alias gpt-oss-20b production 3 --store ./store
    specmoe store alias gpt-oss-20b candidate --remove --store ./store

LOCATION is a folder or s3://bucket/prefix. Without --store it is SPECMOE_STORE, else the versions shipped
with specMoE.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import orjson

from model_store.errors import StoreError
from model_store.manifest import Manifest
from model_store.store import Store, broken, open_store

# What `show` tells of the metrics; --json has them all.
SHOWN = ("recall_at_k", "recall_at_2k", "hit_at_1", "ece")
SHOWN_DISTANCES = ("start", "1", "4", "16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store", metavar="LOCATION", default=os.environ.get("SPECMOE_STORE"), help="which store"
    )
    scripted = argparse.ArgumentParser(add_help=False)
    scripted.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    actions.add_parser("list", parents=[common, scripted], help="all versions, one a line")

    show = actions.add_parser("show", parents=[common, scripted], help="what a version says of itself")
    show.add_argument("model", metavar="MODEL")
    show.add_argument(
        "version", metavar="VERSION", nargs="?", help="number or alias (production, else the newest)"
    )

    verify = actions.add_parser(
        "verify", parents=[common, scripted], help="read every byte; exit 1 if one is wrong"
    )
    verify.add_argument("model", metavar="MODEL", nargs="?", help="(all)")

    alias = actions.add_parser("alias", parents=[common], help="let an alias point to a version")
    alias.add_argument("model", metavar="MODEL")
    alias.add_argument("name", metavar="NAME")
    alias.add_argument("version", metavar="VERSION", nargs="?", help="number or another alias")
    alias.add_argument("--remove", action="store_true", help="forget the alias")
    alias.set_defaults(usage_error=alias.error)


def run(args: argparse.Namespace) -> int:
    store = open_store(args.store)
    action = {"list": _list, "show": _show, "verify": _verify, "alias": _alias}[args.action]
    return action(store, args)


def _list(store: Store, args: argparse.Namespace) -> int:
    rows = [row for model in store.models() for row in _versions(store, model)]
    if args.json:
        _print_json(rows)
        return 0
    print(f"{store.location}: {len(rows)} versions")
    columns = [[_cell(row, field) for row in rows] for field in ("model", "version", "aliases", "summary")]
    widths = [max(map(len, column), default=0) for column in columns]
    for cells in zip(*columns, strict=True):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return 0


def _versions(store: Store, model: str) -> list[dict[str, Any]]:
    """One row a version, the broken ones with their reason."""
    try:
        aliases, unreadable = store.aliases(model), None
    except StoreError as error:
        aliases, unreadable = {}, error.message
    rows = []
    for version in store.versions(model):
        names = sorted(name for name, target in aliases.items() if target == version)
        row: dict[str, Any] = {"model": model, "version": version, "aliases": names, "broken": unreadable}
        try:
            row |= _described(store.manifest(model, version))
        except StoreError as error:
            row["broken"] = error.message
        rows.append(row)
    return rows


def _described(manifest: Manifest) -> dict[str, Any]:
    return {
        "predictor": manifest.predictor.name,
        "parameters": manifest.predictor.parameters,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "created": manifest.created.isoformat(),
    }


def _cell(row: dict[str, Any], field: str) -> str:
    if field != "summary":
        return ", ".join(row[field]) if field == "aliases" else str(row[field])
    reason = f"BROKEN: {row['broken']}" if row["broken"] else ""
    if "bytes" not in row:
        return reason
    return f"{row['predictor']}, {_megabytes(row['bytes'])}, {row['created'][:10]}  {reason}".rstrip()


def _show(store: Store, args: argparse.Namespace) -> int:
    version = store.resolve(args.model, args.version)
    manifest = store.manifest(args.model, version)
    if args.json:
        _print_json(manifest.model_dump(mode="json"))
        return 0
    aliases = [name for name, target in store.aliases(args.model).items() if target == version]
    for label, value in _facts(manifest, sorted(aliases)):
        print(f"{label:<12} {value}")
    return 0


def _facts(manifest: Manifest, aliases: list[str]) -> list[tuple[str, str]]:
    spec, lineage = manifest.spec, manifest.lineage
    inputs = [
        name
        for name, used in (("token ids", manifest.uses_token_ids), ("gates", manifest.uses_gates))
        if used
    ]
    facts = [
        ("model", f"{spec.model}: {spec.num_layers} layers x {spec.num_experts} experts, top {spec.top_k}"),
        ("version", f"{manifest.version}, created {manifest.created:%Y-%m-%d %H:%M} UTC"),
        ("aliases", ", ".join(aliases) or "none"),
        ("predictor", f"{manifest.predictor.name}, {manifest.predictor.parameters:,} parameters"),
        ("uses", ", ".join(["experts", *inputs])),
        ("state", ", ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in manifest.state) or "none"),
        ("coverage", ", ".join(f"{level:g}" for level in manifest.coverage.levels) or "none"),
    ]
    facts += [
        (name, f"{_megabytes(file.bytes)}, sha256 {file.sha256}") for name, file in manifest.files.items()
    ]
    facts += [
        (
            split,
            f"distance {distance}: "
            + ", ".join(f"{name} {scores[name]:.4g}" for name in SHOWN if name in scores),
        )
        for split, distances in manifest.metrics.items()
        for distance, scores in distances.items()
        if distance in SHOWN_DISTANCES
    ]
    facts += [
        ("traces", f"{t.use}: {t.name}, {t.tokens:,} tokens, sha256 {t.sha256}") for t in lineage.traces
    ]
    facts += [
        ("command", lineage.command),
        ("code", f"{lineage.code_revision}, seed {lineage.seed}"),
        (
            "trained",
            f"{lineage.trained_seconds:,.0f} s on {lineage.hardware}"
            + (", on the validation traces, too; scored before that" if lineage.refit else ""),
        ),
    ]
    return facts


def _verify(store: Store, args: argparse.Namespace) -> int:
    models = store.models() if args.model is None else [args.model]
    checked = [f"{model} {version}" for model in models for version in store.versions(model)]
    problems = [
        {"model": model, "what": what, "reason": error.message, "remedy": error.remedy}
        for model in models
        for what, error in broken(store, model)
    ]
    if args.json:
        _print_json({"checked": checked, "broken": problems})
    else:
        for problem in problems:
            print("BROKEN {model} {what}: {reason} {remedy}".format(**problem))
        print(f"{store.location}: {len(checked)} versions read, {len(problems)} problems")
    return 1 if problems else 0


def _alias(store: Store, args: argparse.Namespace) -> int:
    if args.remove == (args.version is not None):
        args.usage_error("give a VERSION, or --remove")
    if args.remove:
        store.remove_alias(args.model, args.name)
        print(f"{args.model}: {args.name} removed")
        return 0
    version = store.resolve(args.model, args.version)
    store.set_alias(args.model, args.name, version)
    print(f"{args.model}: {args.name} -> version {version}")
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def _print_json(document: object) -> None:
    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())
