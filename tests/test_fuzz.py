"""Generated bad inputs: a right result, or an error that this package states."""

import pytest

pytest.importorskip('hypothesis')

from benchmarks import fuzz, fuzz_models


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'examples'),
    [
        *(('annotations', 40), ('label maps', 60), ('images', 40), ('config', 60)),
        *(('overrides', 60), ('backbones', 150), ('checkpoints', 60)),
    ],
)
def test_generated_inputs(kind, examples, tmp_path):
    fuzz.prepare(tmp_path)
    counts, mishandled = fuzz.run(kind, examples, tmp_path)
    assert mishandled == []
    assert counts['refused']
    assert counts['right'] or kind == 'checkpoints'  # few of them are; see below
    assert counts.total() >= examples


def test_a_sound_checkpoint_is_right(tmp_path):
    for kind in ('zip', 'legacy', 'safetensors'):
        raw = fuzz_models.written(fuzz_models.state(), kind)
        assert fuzz_models.try_checkpoint((bytes(raw), kind == 'zip'), tmp_path) == 'right'


def use_up_memory(value, root):
    bytearray(100)
    return 'right'


@pytest.mark.parametrize(
    ('attempt', 'message'),
    [
        (lambda value, root: [][0], 'IndexError: list index out of range'),
        (lambda value, root: int('x'), 'ValueError: invalid literal'),  # not of this package
        (lambda value, root: exec('while True: pass'), 'TimeoutError: it takes more than'),
        (use_up_memory, 'MemoryError: it takes'),
    ],
)
def test_what_is_mishandled_is_told(attempt, message, tmp_path, monkeypatch):
    strategy, _ = fuzz.KINDS['label maps']
    monkeypatch.setitem(fuzz.KINDS, 'label maps', (strategy, attempt))
    monkeypatch.setattr(fuzz, 'MAX_SECONDS', 0.2)
    if attempt is use_up_memory:
        sizes = iter([1, 3 * 2**30] + [3 * 2**30] * 9)
        monkeypatch.setattr(fuzz, 'peak_memory', lambda: next(sizes))
    _, mishandled = fuzz.run('label maps', 3, tmp_path, shrink=False)
    assert len(mishandled) == (1 if attempt is use_up_memory else 3)
    assert mishandled[0].startswith(message)
    assert 'values' in mishandled[0]
