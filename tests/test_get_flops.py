"""tools/get_flops.py prints the table of a config and refuses an unknown model in one line."""

import re

from .conftest import ROOT, needs_flop_counter
from .scripts import run_script


@needs_flop_counter
def test_command():
    config = ROOT / 'configs/cascade/pvt_v2_b2_fpn_3x.py'
    tool = ROOT / 'tools/get_flops.py'
    options = ['--shape', '224', '224', '--depth', '1']
    printed = run_script([tool, config, *options]).stdout
    assert re.search(r'\| CascadeRCNN +\| +82\.85 \|', printed)
    assert re.search(r'\|   backbone +\| +24\.85 \| +4\.04 \| .* \| +0\.14 \|', printed)
    assert 'at 224x224: 82.85 M parameters, ' in printed
    assert 'block1' not in printed
    wrong = run_script([tool, 'pvt_smal'])
    assert wrong.returncode == 1
    assert wrong.stdout.startswith('pvt_smal is neither a config nor one of pvt_tiny, ')
