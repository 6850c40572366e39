"""kill -9 at random instants, a handful; ``python -m benchmarks.kills`` does hundreds."""

import pytest

from benchmarks.kills import kill_repeatedly


@pytest.mark.slow
def test_no_kill_loses_a_finished_checkpoint(tmp_path):
    counts = kill_repeatedly(tmp_path, 5, seed=3)
    assert counts['kills'] == 5, (tmp_path / 'output').read_text()[-3000:]
    assert counts['failed'] == counts['lost'] == 0
    assert counts['checkpoints'] > 0
