"""Repeats the property tests, each round with another seed, until the time is over or a test fails.

make fuzz SECONDS=3600
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
from time import perf_counter

# Seconds for one test. A whole round takes 20 s on an idle machine, and no test takes a tenth of that.
TEST_TIMEOUT = 300


def play(seed: int) -> tuple[bool, str]:
    """One round: whether it passed, and the output of pytest."""
    chosen = ("-m", "hypothesis", f"--hypothesis-seed={seed}", "--hypothesis-show-statistics")
    how = ("-q", "-x", f"--timeout={TEST_TIMEOUT}", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, *how], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode == 0, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, help="seed of the first round; random by default")
    options = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    begun, seed, examples = perf_counter(), first, 0
    while perf_counter() - begun < options.seconds:
        passed, said = play(seed)
        if not passed:
            said = re.sub(r"^=+ Hypothesis Statistics =+\n.*?(?=^=+ )", "", said, flags=re.M | re.S)
            sys.stdout.write(f'{said}\nto reproduce: make test ARGS="-m hypothesis --hypothesis-seed={seed}"\n')
            return 1
        examples += sum(map(int, re.findall(r"(\d+) passing,", said)))
        tests = re.findall(r"(\d+) passed", said)[-1]
        elapsed = perf_counter() - begun
        sys.stdout.write(f"{elapsed:6.0f} s  seed {seed}: {tests} tests pass; {examples:,} examples so far\n")
        sys.stdout.flush()
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
