"""Change files of every kind that the package reads, and say what is neither read nor refused in one line.

`python tests/fuzz.py -n 10000 decisions "skills.json of NEW"` draws seeds 0 to 9,999 of two kinds; without a kind all.
A failure ends nothing: each place that raises is shown once, with its first seed, which `--first SEED -n 1` repeats.
`--coverage SECONDS` lets atheris choose what to change further, by the lines of skillfast that a file reached.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

LONGEST = 60  # seconds for one file, after which reading it hangs


def fuzz(name: str, first: int, n: int) -> int:
    """Draw n changes of a kind's example; returns how many failed."""
    from readers import KINDS

    kind, seen, shown = KINDS[name], Counter[str](), Counter[str]()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        raw = kind.example(folder)
        for seed in range(first, first + n):
            signal.alarm(LONGEST)
            try:
                seen["refused" if kind.refuses(folder, kind.change(random.Random(seed), raw)) else "read"] += 1
            except BaseException as error:  # a panic of a library's Rust code is no Exception
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                place = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{place.filename}:{place.lineno}"
                shown[at] += 1
                if shown[at] == 1:
                    print(f"{name}, seed {seed}:\n{traceback.format_exc()}", flush=True)
            finally:
                signal.alarm(0)
    failed = sum(shown.values())
    print(
        f"{name}: {seen['refused']:,} refused, {seen['read']:,} read, {failed:,} failed at {len(shown)} places "
        f"({time.process_time() - started:.0f} s of CPU)",
        flush=True,
    )
    return failed


def fuzz_by_coverage(name: str, seconds: int) -> None:
    """Change a kind's example further where that reaches new lines; ends the process, with 0 where nothing failed."""
    import atheris

    with atheris.instrument_imports(include=["skillfast"]):
        from readers import KINDS
    import mutations

    kind, folder = KINDS[name], Path(tempfile.mkdtemp())
    raw = kind.example(folder)
    (folder / "corpus").mkdir()
    (folder / "corpus" / "example").write_bytes(raw)

    def change(data: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        try:
            made = kind.change(draw, data)
        except Exception:  # of a file that is damaged already, which has no parts to change
            made = mutations.changed_bytes(draw, data)
        return made[:most]

    options = [f"-max_total_time={seconds}", f"-timeout={LONGEST}", f"-max_len={8 * len(raw)}", "-print_final_stats=1"]
    atheris.Setup(
        [sys.argv[0], *options, f"-artifact_prefix={folder}/", str(folder / "corpus")],
        lambda data: kind.refuses(folder, data),
        custom_mutator=change,
    )
    atheris.Fuzz()


def _hangs(*_: Any) -> None:
    raise TimeoutError(f"reading takes more than {LONGEST} s")


def main() -> int:
    """Run what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="as in tests/readers.py; default: all")
    parser.add_argument("-n", type=int, default=10_000, help="changes of each kind (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: %(default)s)")
    parser.add_argument("--coverage", type=int, metavar="SECONDS", help="atheris for so long on each kind")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # what is odd in a file may be warned of, too
    if chosen.coverage and len(chosen.kinds) == 1:
        fuzz_by_coverage(chosen.kinds[0], chosen.coverage)
    from readers import KINDS

    if unknown := set(chosen.kinds) - set(KINDS):
        parser.error(f"expected some of {', '.join(KINDS)}, got {', '.join(unknown)}")
    kinds = chosen.kinds or list(KINDS)
    if chosen.coverage:  # atheris ends its process
        again = [sys.executable, __file__, "--coverage", str(chosen.coverage)]
        return max(subprocess.run([*again, kind], check=False).returncode != 0 for kind in kinds)
    signal.signal(signal.SIGALRM, _hangs)
    return int(sum([fuzz(name, chosen.first, chosen.n) for name in kinds]) > 0)


if __name__ == "__main__":
    sys.exit(main())
