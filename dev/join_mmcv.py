"""Join the C++ sources of mmcv's operators into four, in an unpacked source distribution of mmcv.

    python dev/join_mmcv.py FOLDER

mmcv has some 80 small C++ sources, and each includes torch's headers. Compiling the headers 80
times takes twenty minutes. This script renames the sources to ``.inc`` and writes four new ones
that include them, and those compile in a minute. CUDA sources and their bindings stay as they are.

The operators have to compute the same numbers, to the last bit. So no source may change what the
next one means, and three kinds of source have their own place:

- Four sources define templates of the same names: each is in another unit.
- Some sources include more of torch, and a ``math.h`` with it, which turns ``cos`` of a float from
  a double into a float for all that follows: they end a unit.
- Some sources define macros or say ``using namespace std``: they end a unit, too.

A source of another mmcv that does not fit is a compile error, and ``dev/setup_venv.sh`` then
compiles the sources as they are. ``dev/compare_mmcv_builds.py`` compares the numbers.
"""

import sys
from pathlib import Path

SOURCES = 'mmcv/ops/csrc/pytorch'
# Of each unit: its one source of those with the same templates, and the sources that end it.
UNITS: list[tuple[str, list[str]]] = [
    ('cpu/bezier_align.cpp', ['pybind.cpp']),
    (
        'cpu/roi_align.cpp',
        ['cpu/sparse_indice.cpp', 'cpu/sparse_maxpool.cpp', 'cpu/sparse_reordering.cpp'],
    ),
    ('cpu/roi_align_rotated.cpp', ['info.cpp', 'contour_expand.cpp']),
    ('cpu/rotated_feature_align.cpp', ['cpu/psamask.cpp']),
]


def plan(names: list[str]) -> list[list[str]]:
    """Names of sources, by the unit that includes them and in that order."""
    placed = {name for first, last in UNITS for name in (first, *last)}
    others = sorted(set(names) - placed)
    units = []
    for index, (first, last) in enumerate(UNITS):
        wanted = [first, *others[index :: len(UNITS)], *last]
        units.append([name for name in wanted if name in names])
    return units


def join(folder: Path) -> None:
    """Rename the sources below an unpacked mmcv and write the units that include them."""
    root = folder / SOURCES
    names = [p.relative_to(root).as_posix() for p in [*root.glob('*.cpp'), *root.glob('cpu/*.cpp')]]
    if 'pybind.cpp' not in names:
        sys.exit(f'found no {SOURCES}/pybind.cpp in {folder}, expected the sources of mmcv')
    for number, unit in enumerate(plan(names), 1):
        lines = []
        for name in unit:
            source = root / name
            source.rename(source.with_suffix('.inc'))
            lines.append(f'#include "{source.with_suffix(".inc").relative_to(root).as_posix()}"\n')
        (root / f'joined_{number}.cpp').write_text(''.join(lines), 'utf-8')


if __name__ == '__main__':
    join(Path(sys.argv[1]))
