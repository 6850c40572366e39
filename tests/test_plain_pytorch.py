"""examples/plain_pytorch.py learns, in a process in which nothing of OpenMMLab but mmengine is."""

import re
import subprocess
import sys

import pytest

from .conftest import ROOT

WITHOUT = ('mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torchvision')
CODE = (
    f'import runpy, sys\nsys.modules.update(dict.fromkeys({WITHOUT}))\n'  # None: not to be imported
    'sys.argv = ["", "--steps", "60"]\n'
    f'runpy.run_path({str(ROOT / "examples/plain_pytorch.py")!r}, run_name="__main__")\n'
)


@pytest.mark.slow
def test_it_learns_to_find_objects():
    done = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r'step \d+: loss (\S+)', done.stdout)]
    assert losses[-1] < losses[0] / 4
    right, total, wrong = map(int, re.findall(r'\d+', done.stdout.splitlines()[-1]))
    assert total == 200
    assert right > 120 and wrong < 400  # of 25,600 places; after 300 steps 200 and 1
