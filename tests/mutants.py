"""Mutation score of the mathematical packages, on a seeded sample of the mutants that mutmut makes.

Usage: python tests/mutants.py [--count 300] [--seed 0] [--minutes 60]

mutmut copies the project to mutants/ and makes every mutant; a sample is drawn from its list, and each mutant is run
against the fast tests that reach its function. An interrupted run goes on where it stopped. mutmut makes no mutants of
decorated functions (most properties, class methods and context managers), of class bodies (defaults of fields) and of
module constants. The result, with the survivors, goes to tests/mutants/<date>-seed-<seed>.json; reasons for equivalent
mutants stand in tests/mutants/equivalent.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import pathlib
import random
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "mutants"
PACKAGES = ("core", "solvers", "gradients", "inputs", "bilevel")
FIRST = "equipoise.core.linalg.x_row_dots__mutmut_1"  # naming one makes mutmut write all mutants and run one
KILLED, SURVIVED, UNREACHED = (1, 3, 36, 24, -24, 152, 255), 0, (5, 33)


def verdicts() -> dict[str, int | None]:
    """Exit codes that mutmut has recorded, None for a mutant that did not run yet."""
    found: dict[str, int | None] = {}
    for package in PACKAGES:
        for meta in sorted((ROOT / "mutants" / "src" / "equipoise" / package).rglob("*.meta")):
            found |= json.loads(meta.read_text())["exit_code_by_key"]
    return found


def mutmut(*arguments: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutants in the sample [300]")
    parser.add_argument("--seed", type=int, default=0, help="of the sample [0]")
    parser.add_argument("--minutes", type=float, default=60.0, help="time after which a run stops, to go on later [60]")
    options = parser.parse_args()
    start = time.monotonic()
    if not verdicts():
        made = mutmut("run", FIRST)
        if not verdicts():
            raise SystemExit(f"mutmut made no mutants:\n{made.stdout[-3000:]}{made.stderr[-3000:]}")
    population = sorted(verdicts())
    sample = random.Random(options.seed).sample(population, min(options.count, len(population)))
    waiting = [name for name in sample if verdicts()[name] is None]
    if waiting:
        with contextlib.suppress(subprocess.TimeoutExpired):  # mutmut keeps what it finished
            done = mutmut("run", *waiting, seconds=max(1.0, 60 * options.minutes - (time.monotonic() - start)))
            print(done.stdout[-2000:])
        left = sum(verdicts()[name] is None for name in sample)
        if left:
            raise SystemExit(f"{left} of {len(sample)} mutants are left; run the same command again")
    report(sample, population, options.seed)


def report(sample: list[str], population: list[str], seed: int) -> None:
    """Print and write the score: killed mutants over those that are not declared equivalent."""
    codes = verdicts()
    known = RESULTS / "equivalent.json"
    reasons: dict[str, str] = json.loads(known.read_text()) if known.exists() else {}
    alive = [name for name in sample if codes[name] not in KILLED]
    diffs = {name: mutmut("show", name).stdout for name in alive}
    equivalent = {name: reasons[key] for name in alive for key in reasons if key in diffs[name]}
    survivors = [name for name in alive if name not in equivalent]
    score = (len(sample) - len(alive)) / (len(sample) - len(equivalent))
    result = {
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "population": len(population),
        "sample": len(sample),
        "killed": len(sample) - len(alive),
        "equivalent": equivalent,
        "score": round(score, 4),
        "survivors": {name: diffs[name] for name in survivors},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['date']}-seed-{seed}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"score {score:.3f}: {result['killed']} of {len(sample)} killed, {len(equivalent)} equivalent; {path}")


if __name__ == "__main__":
    main()
