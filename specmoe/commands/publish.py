"""Put an exported predictor into a store as a new version.

    specmoe publish runs/mine/export --store ./store
    specmoe publish runs/mine/export --store s3://models/specmoe --alias production

FOLDER holds draft.json and the graphs it describes, as export writes them. They are checked, loaded and
run: only what answers as its export promised is published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model_store.store import open_store
from speculation.publishing import publish_export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what export wrote")
    parser.add_argument(
        "--store", required=True, metavar="LOCATION", help="folder, made where missing, or s3://bucket/prefix"
    )
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME",
        help="let it point to the new version; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    store = open_store(args.store)
    manifest = publish_export(args.folder, store, aliases=args.alias)
    aliases = f" as {', '.join(args.alias)}" if args.alias else ""
    print(f"Published {manifest.spec.model} version {manifest.version}{aliases} to {store.location}")
    return 0
