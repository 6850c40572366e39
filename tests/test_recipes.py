"""The recipes of docs/recipes.md, each under its own head, take a step of training."""

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from .conftest import ROOT
from .test_models import segmentation_batch

TEXT = (ROOT / 'docs/recipes.md').read_text('utf-8')
RECIPES = {
    re.search("'(.+?)_", recipe)[1]: recipe
    for recipe in re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
}
# One layer in the place of six, and few queries and points, so that a step takes a second.
SMALLER = {'num_layers': 1, 'num_queries': 20, 'num_points': 64}


def shrink(node: object) -> None:
    """Replace the numbers of a config that cost time and do not touch the backbone's outputs."""
    if isinstance(node, dict):
        node.update({key: n for key, n in SMALLER.items() if isinstance(node.get(key), int)})
        if 'pos_fraction' in node:  # a sampler of 512 boxes
            node['num'] = 16
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            shrink(child)


def test_recipes_of_every_kind_are_there():
    assert set(RECIPES) == {
        'mmdet::dino/dino-4scale',
        *('mmdet::deformable', 'mmdet::rtmdet/rtmdet', 'mmdet::mask2former/mask2former'),
        *('mmdet::point', 'mmdet::pafpn/faster-rcnn', 'mmdet::panoptic'),
        *('mmseg::mask2former/mask2former', 'mmseg::upernet/upernet', 'mmseg::segformer/segformer'),
    }


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_takes_a_step(name, tmp_path):
    from mmdet.testing import demo_mm_inputs

    (tmp_path / 'mine.py').write_text(RECIPES[name])
    cfg = Config.fromfile(tmp_path / 'mine.py')
    init_default_scope(cfg.default_scope)
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert preprocessor.bgr_to_rgb
    preprocessor.pop('batch_augments', None)  # pads to 1024 x 1024
    shrink(cfg.model)
    cfg.model.backbone.update(depths=(1, 1, 1, 1), drop_path_rate=0.0, init_cfg=None)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    model.init_weights()
    if cfg.default_scope == 'mmseg':
        data = segmentation_batch((64, 64), (64, 64))
        model.data_preprocessor.size = (64, 64)
    else:
        panoptic = 'panoptic' in name  # loads masks without being told to
        with_mask = panoptic or "'with_mask': True" in str(cfg.train_dataloader.to_dict())
        options = dict(with_mask=with_mask, use_box_type=False, with_semantic=panoptic)
        data = demo_mm_inputs(2, [[3, 64, 96], [3, 64, 64]], num_classes=80, **options)
    before = {key: p.detach().clone() for key, p in model.backbone.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    loss.backward()
    assert loss.isfinite() and loss > 0
    grads = {key: p.grad for key, p in model.backbone.named_parameters()}
    assert [key for key, grad in grads.items() if grad is None or not grad.any()] == []
    assert all(grad.isfinite().all() for grad in grads.values())
    optimizer.step()
    still = {key for key, p in model.backbone.named_parameters() if torch.equal(p, before[key])}
    assert still == set()
