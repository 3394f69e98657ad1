"""`python -m cuflash`: what this machine has, and proof that attention works on it.

The exit status is 0 when every check passed, 1 when one failed or could not be made.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from cuflash import _selfcheck
from cuflash._system import show_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cuflash",
        description="State what cuflash found on this machine, then run attention forward and "
        "backward, check it against float64 and time it beside the plain formula.",
        epilog="Exit status: 0 when every check passed, 1 when one failed or could not be made.",
    )
    parser.add_argument("--quick", action="store_true", help="short sequences: a second or two")
    parser.add_argument("--config", action="store_true", help="only state what was found")
    options = parser.parse_args(arguments)

    print(show_config(), flush=True)
    if options.config:
        return 0
    if reason := _selfcheck.missing():
        print(f"\n{reason}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    failed = 0
    for item in _selfcheck.run(options.quick):
        if isinstance(item, _selfcheck.Row):
            failed += item.verdict.startswith("FAILED")
            text = str(item)
        else:
            text = f"\n{item}"
        # Through tqdm, so that the bar and the table do not tear each other.
        tqdm.write(text, file=sys.stdout)
    seconds = time.perf_counter() - start
    verdict = f"{failed} checks FAILED" if failed else "all checks passed"
    print(f"\n{verdict} in {seconds:.0f} s (errors are largest absolute ones against float64)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
