"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import pathlib

import benchmarks
from benchmarks import harness

questions = sorted(path.parent.name for path in pathlib.Path(__file__).parent.glob("*/run.py"))
parser = argparse.ArgumentParser(
    prog="python -m benchmarks",
    description=benchmarks.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
)
parser.add_argument("command", choices=("report", *questions))
parser.add_argument("arguments", nargs=argparse.REMAINDER)
args = parser.parse_args()
if args.command == "report":
    harness.report(args.arguments)
else:
    importlib.import_module(f"benchmarks.{args.command}.run").main(args.arguments)
