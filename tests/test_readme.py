"""The README's examples work as printed, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
EXAMPLES = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


@pytest.mark.parametrize('example', [e for e in EXAMPLES if '_base_' in e], ids=[0, 1])
def test_configs(example, tmp_path):
    from mmdet.registry import MODELS

    path = tmp_path / 'mine.py'
    path.write_text(example.replace("'configs/", f"'{ROOT}/configs/"))
    cfg = Config.fromfile(path)
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert type(model.backbone).__module__ == 'pvt_mm.pvt'
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    if 'metainfo' in example:
        assert model.bbox_head.num_classes == 2
        assert cfg.val_dataloader.dataset.metainfo.classes == ('cat', 'dog')


def test_backbone_alone():
    example = next(e for e in EXAMPLES if '_base_' not in e)
    printed = subprocess.run(
        [sys.executable, '-c', example],
        **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True),
    ).stdout
    assert printed.strip() == re.search(r'print\(.*\)  # (.*)', example)[1]


def test_every_file_that_is_linked_exists():
    links = re.findall(r'\]\(([^)#]+)\)', README)
    local = [link for link in links if '://' not in link]
    assert len(local) > 5
    assert not [link for link in local if not (ROOT / link).exists()]
