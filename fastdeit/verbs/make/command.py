"""What `fastdeit data make` does."""

import argparse
from importlib import import_module
from pathlib import Path

from fastdeit.errors import UsageError
from fastdeit.text import did_you_mean, some
from fastdeit.verbs import progress
from fastdeit.verbs.make import made, packages
from fastdeit.verbs.make.names import SETS


def make(args: argparse.Namespace) -> None:
    """`fastdeit data make NAME --out DIR`, or `--packages` for the list of what it needs."""
    wanted = _set(args.name)
    if args.packages:
        print("\n".join(package.spec for package in wanted.packages))
        return
    if args.out is None:
        raise UsageError(f"say which folder to make: fastdeit data make {args.name} --out DIR")
    root = None if args.root is None else Path(args.root)
    found = packages.find(args.name, wanted.packages, root)
    with progress.shown(f"making {args.name}") as report:
        result = made.write(args.name, wanted, found, Path(args.out), report)
    for split, classes in result.counts.items():
        print(f"{args.out}/{split}: {sum(classes.values()):,} pictures in {len(classes)} classes")
    print(f"SHA-256 of all names and pixels: {result.fingerprint}")
    if result.differences:
        print(f"this is not the set as documented: {some(result.differences)} (all in {args.out}/README.md)")
    print(f"next: fastdeit train {args.name} --data {args.out}")


def _set(name: str) -> made.MadeSet:
    if name not in SETS:
        raise UsageError(f"there is no set {name!r} (sets: {', '.join(SETS)}){did_you_mean(name, SETS)}")
    found: made.MadeSet = import_module(f"fastdeit.verbs.make.{name}").SET
    return found
