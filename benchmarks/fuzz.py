"""Feed generated bad inputs to the checks, the backbones, and what comes after them.

    python -m benchmarks.fuzz --examples 1500
    python -m benchmarks.fuzz --examples 500 --kinds annotations --seed 3

Every input has to give a right result, or an error that this package raises itself: a sentence with
the value and what to do. Anything else is mishandled: another exception, 60 seconds of CPU time,
more than 2 GB of memory. An input that is mishandled is printed. Needs hypothesis.
"""

import argparse
import contextlib
import gc
import io
import logging
import pickle
import re
import resource
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

import pvt_mm
from pvt_mm.data.loading import DataError
from pvt_mm.engine import UsageError, import_host

from . import fuzz_data, fuzz_models

MAX_MEMORY = 2 * 2**30
MAX_SECONDS = 60  # of the CPU; an example takes less than one
REFUSALS = (UsageError, DataError, ValueError, RuntimeError, OSError, pickle.UnpicklingError)
KINDS = fuzz_data.KINDS | fuzz_models.KINDS


def peak_memory() -> int:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def is_own(error: Exception) -> bool:
    """True for an error that a ``raise`` of this package has made, in one sentence."""
    if re.search(r'unexpected keyword argument|is not in the .* registry', str(error)):
        return True  # the sentences of Python, and of mmengine's registries
    place = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(place.filename).is_relative_to(Path(pvt_mm.__file__).parent)
    is_told = isinstance(error, REFUSALS) and place.line.startswith('raise ')
    # A UsageError has a sentence for each value that is wrong.
    is_short = isinstance(error, UsageError) or len(str(error).splitlines()) == 1
    return is_ours and is_told and is_short


def run(
    kind: str, examples: int, root: Path, shrink: bool = True, number: int = 0
) -> tuple[Counter, list[str]]:
    """Try generated inputs of a kind.

    Args:
        kind: One of KINDS.
        examples: How many.
        root: A folder that :func:`prepare` has filled.
        shrink: Raise the first error, for the smallest input; else collect them.
        number: The seed.

    Returns:
        How many were refused and how many gave a right result; the inputs that were mishandled.
    """
    strategy, attempt = KINDS[kind]
    counts, mishandled = Counter(), []
    phases = [Phase.explicit, Phase.generate] + ([Phase.shrink] if shrink else [])

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f'it takes more than {MAX_SECONDS} s')

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy())
    def example(value: Any) -> None:
        was_small = peak_memory() <= MAX_MEMORY
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                try:
                    result = attempt(value, root)
                except Exception as error:
                    if not is_own(error):
                        raise
                    result = 'refused'
            if was_small and peak_memory() > MAX_MEMORY:
                raise MemoryError(f'it takes {peak_memory() / 2**30:.1f} GiB')
            counts[result] += 1
        except Exception as error:
            if shrink:
                raise
            frames = traceback.extract_tb(error.__traceback__)[-2:]
            places = ', '.join(f'{Path(f.filename).name}:{f.lineno}' for f in frames)
            text = f'{type(error).__name__}: {error!s:.300} ({places})'
            mishandled.append(f'{text} {value!r:.1000}')
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    previous = signal.signal(signal.SIGPROF, stop)
    try:
        example()
    finally:
        signal.signal(signal.SIGPROF, previous)
    return counts, mishandled


def prepare(root: Path) -> None:
    """Write the files that the generated ones belong to, and import the hosts."""
    for host in ('mmdet', 'mmseg'):
        import_host(host)
    gc.freeze()  # every dataset of mmengine collects garbage
    logging.getLogger('mmengine').setLevel(logging.CRITICAL)
    warnings.simplefilter('ignore')
    fuzz_data.prepare(root)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--examples', type=int, default=1500, help='inputs of each kind')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=list(KINDS))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for kind in args.kinds:
            counts, mishandled = run(kind, args.examples, Path(folder), False, args.seed)
            print(
                f'{kind}: refused {counts["refused"]}, right {counts["right"]}, mishandled '
                f'{len(mishandled)}, peak memory {peak_memory() / 2**20:.0f} MiB',
                flush=True,
            )
            for line in mishandled[:40]:
                print('  ', line, flush=True)


if __name__ == '__main__':
    main()
