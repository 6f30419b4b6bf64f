"""Benchmarks: a folder for each question, with its programs and its committed results.

From the root of the repository, with the extra `benchmarks` installed:

    python -m benchmarks <question> [--quick] [--out FILE] [--resume] [--seeds N] [--threads N]
    python -m benchmarks report FILE [--plot PNG]

The first measures, and writes FILE (JSON) after each measurement; `--resume` measures what FILE lacks. The second
prints the tables of such a file, finished or not, and draws its figure. The header of `<question>/run.py`, printed by
`--help`, states the claim, the evidence and the definition of each figure.
"""
