"""Test-time augmentation, as the hosts document it: ``tta_pipeline`` and ``tta_model``."""

import copy

from mmengine.config import Config, ConfigDict

from ..data.classes import name_of, named
from ..data.paths import leaf_datasets
from .errors import UsageError

# MMDetection's defaults.
_MODELS = {
    'mmdet': dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    ),
    'mmseg': dict(type='SegTTAModel'),
}


def augment_test(cfg: Config) -> None:
    """Make a config test with augmentation, in place.

    What it does not name is that of the host, with each image as it is and flipped.

    Raises:
        UsageError: the model predicts masks, which MMDetection does not merge.
    """
    masks = [key for key, part in named(cfg.model, 'model') if part.get('mask_head')]
    if masks and cfg.default_scope == 'mmdet':
        raise UsageError(
            f'--tta: MMDetection merges boxes only, and {masks[0]}.mask_head predicts masks: test '
            f'without --tta, or with --cfg-options {masks[0]}.mask_head=None '
            f'test_evaluator.metric=bbox.'
        )
    for _, dataset in leaf_datasets({'test': cfg.test_dataloader.dataset}):
        dataset.pipeline = cfg.get('tta_pipeline') or _with_flips(dataset.pipeline)
    merging = cfg.get('tta_model') or _MODELS[cfg.default_scope]
    cfg.model = ConfigDict(**merging, module=cfg.model)


def _with_flips(pipeline: list[dict]) -> list[dict]:
    """A test pipeline whose last steps, from the loading of labels on, see two images."""
    names = [name_of(step['type']) for step in pipeline]
    first = next((i for i, name in enumerate(names) if 'LoadAnnotations' in name), -1)
    *tail, packing = copy.deepcopy(pipeline[first:])
    if 'meta_keys' in packing or 'Det' in names[-1]:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        keys = (*packing.get('meta_keys', keys), 'flip', 'flip_direction')
        packing['meta_keys'] = tuple(dict.fromkeys(keys))
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    steps = [flips, *([step] for step in tail), [packing]]
    return [*pipeline[:first], dict(type='TestTimeAug', transforms=steps)]
