"""Generated bad data: a right result, or an error that the checks state."""

import pytest

pytest.importorskip('hypothesis')

from benchmarks import fuzz_data


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'examples'), [('annotations', 60), ('label maps', 60), ('config', 80)]
)
def test_generated_data(kind, examples, tmp_path):
    fuzz_data.prepare(tmp_path)
    counts, mishandled = fuzz_data.run(kind, examples, tmp_path)
    assert mishandled == []
    assert counts['right'] and counts['refused']
    assert counts.total() >= examples


def test_what_is_mishandled_is_told(tmp_path, monkeypatch):
    def attempt(value, root):
        raise IndexError('list index out of range')

    strategy, _ = fuzz_data.KINDS['label maps']
    monkeypatch.setitem(fuzz_data.KINDS, 'label maps', (strategy, attempt))
    with pytest.raises(IndexError, match='list index'):
        fuzz_data.run('label maps', 3, tmp_path)
    _, mishandled = fuzz_data.run('label maps', 3, tmp_path, shrink=False)
    assert len(mishandled) == 3
    assert mishandled[0].startswith('IndexError: list index out of range')
    assert 'values' in mishandled[0]
