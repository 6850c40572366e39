"""Every config is the authors' recipe, field by field, and its metafile agrees with it.

The facts are in recipes.yml. They leave out what changes no result: the authors'
`find_unused_parameters` (with apex; no parameter is unused), their `RepeatDataset` x 50 (for fewer
restarts of the loader; InfiniteSampler has none) and the workers that load validation images.
"""

import copy
import functools
import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    DefaultScope,
)
from torch import nn

from benchmarks.compare import Run
from pvt_mm import flops
from pvt_mm.weights import WEIGHTS, files, find_checkpoint

from .conftest import ROOT, needs_flop_counter

FAMILIES = (
    *('retinanet', 'maskrcnn', 'cascade', 'atss', 'gfl', 'sparsercnn', 'detr'),
    'semfpn',
)
CONFIGS = [
    f'{family}/{path.stem}'
    for family in FAMILIES
    for path in sorted((ROOT / 'configs' / family).glob('*.py'))
]
FACTS = yaml.safe_load((ROOT / 'tests' / 'recipes.yml').read_text(encoding='utf-8'))
RECIPES = FACTS['recipes']
GROUPS = ('model', 'optimizer', 'schedule', 'data')
SPLITS = ('train', 'val', 'test')
# One of each kind, for tests that are too slow for all configs.
KINDS = (
    *(next(name for name in CONFIGS if name.startswith(f'{family}/')) for family in FAMILIES),
    *('maskrcnn/pvt_v2_b2_fpn_3x', 'detr/r50_50e', 'semfpn/r50_fpn_40k'),
    'semfpn/x101_32x4d_fpn_40k',
)
RELEASES = 'https://github.com/whai362/PVT/releases/download/'
# The keys of a config that hold the fields of a recipe.
RUNNER_KEYS = (
    *('model', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'load_from', 'resume'),
    *(f'{split}_{what}' for split in SPLITS for what in ('cfg', 'dataloader', 'evaluator')),
)

# Not part of a recipe: sources of files, records and messages, workers of a loader.
LEFT_OUT = {'_scope_', 'backend_args', 'meta_keys', 'persistent_workers', 'classwise'}
# To the last digit, see test_evaluation.py; the same checkpoints, written in another way.
SAME_AS = {'FastCocoMetric': 'CocoMetric', 'DurableCheckpointHook': 'CheckpointHook'}
# Defaults of the hosts that belong to a recipe; their values are read from the classes.
RESNET = (
    'in_channels stem_channels base_channels num_stages strides dilations out_indices style '
    'frozen_stages conv_cfg norm_eval dcn plugins '
)
DEFAULTS = {
    'ADE20KDataset': 'ann_file img_suffix seg_map_suffix reduce_zero_label ignore_index',
    'ATSSAssigner': 'alpha ignore_iof_thr',
    'ATSSHead': 'pred_kernel_size conv_cfg norm_cfg reg_decoded_bbox',
    'AmpOptimWrapper': 'dtype',
    'AnchorGenerator': 'center_offset',
    'AspectRatioBatchSampler': 'drop_last',
    'BBoxL1Cost': 'box_format',
    'CascadeRoIHead': 'shared_head',
    'ChannelMapper': 'conv_cfg bias',
    'CheckpointHook': 'by_epoch',
    'CocoDataset': 'filter_cfg test_mode',
    'CocoMetric': 'proposal_nums iou_thrs',
    'ConvFCBBoxHead': 'conv_out_channels num_cls_convs num_cls_fcs num_reg_convs num_reg_fcs '
    'conv_cfg',
    'CrossEntropyLoss': 'class_weight',
    'DETRHead': 'num_reg_fcs sync_cls_avg_factor',
    'DeltaXYWHBBoxCoder': 'clip_border add_ctr_clamp',
    'DetDataPreprocessor': 'pad_value pad_mask rgb_to_bgr batch_augments',
    'DistancePointBBoxCoder': 'clip_border',
    'DistributionFocalLoss': 'reduction',
    'DynamicConv': 'with_proj',
    'EncoderDecoder': 'auxiliary_head pretrained',
    'EpochBasedTrainLoop': 'val_begin',
    'FCNMaskHead': 'conv_kernel_size class_agnostic norm_cfg upsample_cfg',
    'FPN': 'start_level end_level add_extra_convs relu_before_extra_convs no_norm_on_lateral '
    'conv_cfg norm_cfg act_cfg upsample_cfg',
    'FPNHead': 'conv_cfg act_cfg ignore_index sampler',
    'FocalLossCost': 'alpha gamma eps binary_input',
    'GFLHead': 'conv_cfg norm_cfg bbox_coder',
    'GIoULoss': 'eps reduction',
    'IoUMetric': 'ignore_index nan_to_num',
    'IterBasedTrainLoop': 'val_begin',
    'L1Loss': 'reduction',
    'LinearLR': 'end_factor',
    'LoadAnnotations': 'with_bbox with_label with_mask with_seg poly2mask',
    'LoadImageFromFile': 'to_float32 color_type imdecode_backend',
    'MaxIoUAssigner': 'match_low_quality gt_max_assign_all',
    'PVT': 'in_channels out_indices frozen_stages drop_rate attn_drop_rate',
    'PVTv2': 'in_channels out_indices frozen_stages drop_rate attn_drop_rate',
    'PhotoMetricDistortion': 'brightness_delta contrast_range saturation_range hue_delta',
    'QualityFocalLoss': 'reduction',
    'RPNHead': 'num_classes num_convs reg_decoded_bbox',
    'RandomChoice': 'prob',
    'RandomChoiceResize': 'resize_type',
    'RandomCrop': 'ignore_index recompute_bbox bbox_clip_border',
    'RandomFlip': 'direction',
    'RandomResize': 'resize_type',
    'ResNeXt': f'{RESNET} deep_stem avg_down multi_grid',
    'ResNet': f'{RESNET} deep_stem avg_down',
    'ResNetV1c': f'{RESNET} multi_grid',
    'Resize': 'clip_object_border backend interpolation',
    'ResizeToMultiple': 'interpolation',
    'RetinaHead': 'conv_cfg norm_cfg reg_decoded_bbox',
    'SegDataPreProcessor': 'size_divisor rgb_to_bgr batch_augments test_cfg',
    'Shared2FCBBoxHead': 'norm_cfg reg_decoded_bbox',
    'SingleRoIExtractor': 'finest_scale',
    'SmoothL1Loss': 'reduction',
    'SparseRoIHead': 'mask_roi_extractor mask_head',
    'TestLoop': 'fp16',
    'ValLoop': 'fp16',
}
AMP_ONLY = ('loss_scale', 'dtype')  # of AmpOptimWrapper, whose construction needs a GPU
SEG_DEFAULTS = {'LoadAnnotations': 'imdecode_backend'}
REGISTRIES = (
    MODELS,
    TASK_UTILS,
    DATASETS,
    TRANSFORMS,
    DATA_SAMPLERS,
    METRICS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
    LOOPS,
    HOOKS,
)


def all_configs(function):
    return pytest.mark.parametrize('name', CONFIGS)(function)


def load(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


@functools.cache
def load_default(name: str) -> Config:
    """The config with the default data folders; read only."""
    with pytest.MonkeyPatch.context() as patch:
        for data in ('COCO', 'ADE', 'BCCD', 'NUCLEI', 'CAMVID'):
            patch.delenv(f'{data}_ROOT', raising=False)
        return load(name)


def resolved(name: str) -> dict:
    """The config as plain dicts and lists, a fresh copy."""
    return as_plain(load_default(name).to_dict())


def as_plain(node: object) -> object:
    if isinstance(node, Mapping):
        return {key: as_plain(value) for key, value in node.items()}
    return [as_plain(value) for value in node] if isinstance(node, (list, tuple)) else node


@functools.cache
def defaults(scope: str, name: str) -> dict:
    """The :data:`DEFAULTS` of a class, from its own signature and those of its bases."""
    wanted = (SEG_DEFAULTS if scope == 'mmseg' else {}).get(name) or DEFAULTS.get(name, '')
    found = {}
    for registry in REGISTRIES if wanted else ():
        with registry.switch_scope_and_registry(scope) as host:
            cls = host.get(name)
        for base in inspect.getmro(cls) if cls else ():
            for parameter in inspect.signature(base.__init__).parameters.values():
                if parameter.name in wanted.split():
                    found.setdefault(parameter.name, as_plain(parameter.default))
    return found


def complete(node: object, scope: str) -> object:
    """A copy with the defaults of the hosts and without the keys in :data:`LEFT_OUT`."""
    if isinstance(node, list):
        return [complete(value, scope) for value in node]
    if not isinstance(node, dict):
        return node
    if node.get('type') in SAME_AS:
        node = node | {'type': SAME_AS[node['type']]}
    node = copy.deepcopy(defaults(scope, str(node.get('type')))) | node
    return {key: complete(value, scope) for key, value in node.items() if key not in LEFT_OUT}


def read_recipe(cfg: dict) -> dict:
    """The fields of a resolved config that a Runner uses, in the form of recipes.yml."""
    cfg = complete(cfg, cfg['default_scope'])
    return dict(
        model=read_model(cfg['model']),
        optimizer=read_optimizer(cfg['optim_wrapper']),
        schedule=read_schedule(cfg),
        data=read_data(cfg),
    )


def read_model(model: dict) -> dict:
    init_cfg = model['backbone']['init_cfg']
    init_cfg['checkpoint'] = official_url(init_cfg['checkpoint']).removeprefix(RELEASES)
    return model


@functools.cache
def official_url(checkpoint: str) -> str:
    """The URL from which ``find_checkpoint`` downloads a published name; any other as it is."""
    if checkpoint not in WEIGHTS:
        return checkpoint
    asked = []
    with tempfile.TemporaryDirectory() as empty, pytest.MonkeyPatch.context() as patch:
        patch.delenv('PVT_MM_WEIGHTS', raising=False)
        patch.setattr(torch.hub, 'get_dir', lambda: empty)
        patch.setattr(files, 'download', lambda url, path: asked.append(url))
        find_checkpoint(checkpoint)
    return asked[0]


def read_optimizer(wrapper: dict) -> dict:
    """The wrapper, with the optimizer as mmengine builds it and its number of parameter groups."""
    wrapper = dict(clip_grad=None, accumulative_counts=1, paramwise_cfg=None) | wrapper
    wrapper.setdefault('constructor', 'DefaultOptimWrapperConstructor')
    if wrapper['type'] == 'AmpOptimWrapper':
        parameters = inspect.signature(AmpOptimWrapper).parameters
        wrapper = {name: parameters[name].default for name in AMP_ONLY} | wrapper
    groups = parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), wrapper)
    names = ('lr', 'betas', 'eps', 'weight_decay', 'amsgrad', 'momentum', 'dampening', 'nesterov')
    built = {name: as_plain(groups[0][name]) for name in names if name in groups[0]}
    built['lr'] = float(f'{built["lr"]:.13g}')  # recipes.yml writes 2e-4 / 1.4 with as many digits
    return wrapper | {'optimizer': wrapper['optimizer'] | built | {'groups': len(groups)}}


def parameter_groups(model: nn.Module, wrapper: dict) -> list[dict]:
    plain = {k: v for k, v in wrapper.items() if k not in AMP_ONLY} | {'type': 'OptimWrapper'}
    return build_optim_wrapper(model, plain).optimizer.param_groups


def read_schedule(cfg: dict) -> dict:
    hooks = cfg['default_hooks']
    return dict(
        scheduler=cfg['param_scheduler'],
        train=cfg['train_cfg'],
        val=cfg['val_cfg'],
        test=cfg['test_cfg'],
        checkpoint=hooks['checkpoint'],
        lr_hook=hooks['param_scheduler'],
        custom_hooks=cfg.get('custom_hooks', []),
        load_from=cfg['load_from'],
        resume=cfg['resume'],
    )


def read_data(cfg: dict) -> dict:
    data = {split: {'drop_last': False} | cfg[f'{split}_dataloader'] for split in SPLITS}
    for split in ('val', 'test'):
        del data[split]['num_workers']
        metric = cfg[f'{split}_evaluator']
        if 'ann_file' in metric:
            metric = metric | {'ann_file': os.path.normpath(metric['ann_file'])}
        data[f'{split}_metric'] = metric
    scale = cfg['auto_scale_lr']
    data['gpus'] = scale['base_batch_size'] / data['train']['batch_size']
    return data | {'auto_scale_lr': scale.get('enable', False)}


def test_every_config_has_a_recipe():
    assert len(CONFIGS) == 51
    assert set(CONFIGS) == set(RECIPES)


@all_configs
@pytest.mark.parametrize('group', GROUPS)
def test_recipe(name, group):
    assert recipe_of(name)[group] == RECIPES[name][group]


@functools.cache
def recipe_of(name: str) -> dict:
    return read_recipe(resolved(name))


def test_every_backbone_has_the_authors_weights():
    """``checkpoint`` is the name of a published file, and find_checkpoint knows its URL."""
    for name in WEIGHTS:
        cls, arch = flops.backbones()[name]
        init_cfg = dict(type='Pretrained', checkpoint=name)
        expected = dict(type=cls.__name__, arch=arch, init_cfg=init_cfg)
        assert Config.fromfile(ROOT / f'configs/backbones/{name}.py').model == expected
        assert official_url(name) == f'{RELEASES}v2/{name}.pth'
        (entry,) = (m for m in metafile('backbones')['Models'] if m['Name'] == name)
        assert (entry['Config'], entry['Weights']) == (
            f'configs/backbones/{name}.py',
            official_url(name),
        )


OWN_FOLDERS = ('bccd', 'nuclei', 'camvid', 'demo', 'shapes', 'overfit')


@pytest.mark.parametrize('folder', OWN_FOLDERS)
def test_the_rate_of_our_own_recipes_is_for_their_batch(folder):
    """The log tells the two before training, and --auto-scale-lr uses them."""
    for path in (ROOT / 'configs' / folder).glob('*.py'):
        cfg = Config.fromfile(path)
        assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size, path.name


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/*/*.py')), ids=lambda path: path.stem)
def test_configs_name_the_weights(path):
    """Their URLs are written once, in pvt_mm/weights/files.py."""
    assert RELEASES not in path.read_text('utf-8')


# --- the comparison above notices changes --------------------------------------------------------

EMA = [dict(type='EMAHook', momentum=0.001)]
NO_DECAY_ON_NORMS = dict(norm_decay_mult=0.0)


@pytest.mark.parametrize(
    ('name', 'key', 'value', 'group'),
    [
        ('retinanet/pvt_t_fpn_1x', 'optim_wrapper.optimizer.lr', 0.0001 * (1 + 2e-12), 'optimizer'),
        ('retinanet/pvt_t_fpn_1x', 'optim_wrapper.optimizer.betas', (0.9, 0.99), 'optimizer'),
        ('retinanet/pvt_t_fpn_1x', 'optim_wrapper.paramwise_cfg', NO_DECAY_ON_NORMS, 'optimizer'),
        ('retinanet/pvt_t_fpn_1x', 'optim_wrapper.clip_grad', dict(max_norm=1.0), 'optimizer'),
        ('retinanet/pvt_l_fpn_1x', 'optim_wrapper.type', 'OptimWrapper', 'optimizer'),
        ('retinanet/pvt_m_fpn_1x', 'model.backbone.drop_path_rate', 0.1, 'model'),
        ('retinanet/pvt_t_fpn_1x', 'model.backbone.depth', 50, 'model'),
        ('retinanet/pvt_t_fpn_1x', 'model.backbone.init_cfg.prefix', 'backbone.', 'model'),
        ('retinanet/pvt_t_fpn_1x', 'model.data_preprocessor.std', [58.395, 57.12, 57.357], 'model'),
        ('retinanet/pvt_t_fpn_1x', 'model.neck.start_level', 0, 'model'),
        ('retinanet/pvt_t_fpn_1x', 'model.test_cfg.nms.iou_threshold', 0.6, 'model'),
        ('maskrcnn/pvt_t_fpn_1x', 'model.train_cfg.rcnn.assigner.neg_iou_thr', 0.4, 'model'),
        ('maskrcnn/pvt_t_fpn_1x', 'param_scheduler.1.milestones', [9, 11], 'schedule'),
        ('maskrcnn/pvt_t_fpn_1x', 'param_scheduler.0.end', 1000, 'schedule'),
        ('maskrcnn/pvt_t_fpn_1x', 'custom_hooks', EMA, 'schedule'),
        ('maskrcnn/pvt_l_fpn_1x', 'train_dataloader.batch_size', 2, 'data'),
        ('maskrcnn/pvt_l_fpn_1x', 'auto_scale_lr.base_batch_size', 16, 'data'),
        ('semfpn/pvt_t_fpn_40k', 'train_cfg.max_iters', 80000, 'schedule'),
        ('semfpn/pvt_t_fpn_40k', 'param_scheduler.0.power', 1.0, 'schedule'),
        ('semfpn/pvt_t_fpn_40k', 'model.decode_head.num_classes', 151, 'model'),
        (
            'semfpn/pvt_t_fpn_40k',
            'train_dataloader.dataset.pipeline.3.crop_size',
            (512, 640),
            'data',
        ),
        ('semfpn/pvt_t_fpn_40k', 'test_dataloader.dataset.pipeline.2.size_divisor', 16, 'data'),
        (
            'retinanet/pvt_s_fpn_1x_640',
            'test_dataloader.dataset.pipeline.1.scale',
            (1333, 800),
            'data',
        ),
        ('maskrcnn/pvt_v2_b2_fpn_3x', 'optim_wrapper.type', 'AmpOptimWrapper', 'optimizer'),
        ('maskrcnn/pvt_v2_b2_li_fpn_3x', 'optim_wrapper.type', 'OptimWrapper', 'optimizer'),
        ('maskrcnn/pvt_v2_b2_fpn_3x', 'param_scheduler.0.end', 1000, 'schedule'),
        ('cascade/pvt_v2_b2_fpn_3x', 'model.roi_head.bbox_head.2.reg_decoded_bbox', False, 'model'),
        ('atss/pvt_v2_b2_fpn_3x', 'optim_wrapper.paramwise_cfg', NO_DECAY_ON_NORMS, 'optimizer'),
        ('gfl/pvt_v2_b2_fpn_3x', 'optim_wrapper.optimizer.weight_decay', 1e-4, 'optimizer'),
        ('gfl/pvt_v2_b2_fpn_3x', 'model.neck.add_extra_convs', 'on_input', 'model'),
        ('sparsercnn/pvt_v2_b2_li_fpn_3x', 'train_dataloader.batch_size', 1, 'data'),
        ('sparsercnn/pvt_v2_b2_fpn_3x', 'model.rpn_head.num_proposals', 100, 'model'),
        ('detr/pvt_s_50e', 'model.data_preprocessor.pad_size_divisor', 1, 'model'),
        ('detr/pvt_s_50e', 'model.backbone.out_indices', (2,), 'model'),
        ('detr/pvt_s_50e', 'optim_wrapper.clip_grad.max_norm', 1.0, 'optimizer'),
        ('semfpn/r18_fpn_40k', 'optim_wrapper.optimizer.nesterov', True, 'optimizer'),
        ('semfpn/r18_fpn_40k', 'train_cfg.val_interval', 4000, 'schedule'),
        ('semfpn/x101_64x4d_fpn_40k', 'model.backbone.groups', 32, 'model'),
    ],
)
def test_a_changed_field_is_noticed(name, key, value, group):
    cfg = copy.deepcopy(load_default(name))
    cfg.merge_from_dict({key: value})
    read = read_recipe(as_plain(cfg.to_dict()))
    assert [group for group in GROUPS if read[group] != RECIPES[name][group]] == [group]


@pytest.mark.parametrize('name', KINDS)
def test_every_changed_value_is_noticed(name):
    """One by one, each number, flag and string that a Runner uses."""
    cfg = resolved(name)
    unnoticed = set()
    for keys, holder, key in list(leaves(cfg)):
        if keys[0] not in RUNNER_KEYS:
            continue
        value = holder[key]
        holder[key] = changed(value)
        if not differs(cfg, name):
            unnoticed.add(keys)
        holder[key] = value
    assert not differs(cfg, name)
    unnoticed -= {('val_dataloader', 'num_workers'), ('test_dataloader', 'num_workers')}
    assert {keys for keys in unnoticed if not LEFT_OUT.intersection(keys)} == set()


def leaves(node: dict | list, keys: tuple = ()) -> Iterator[tuple[tuple, dict | list, object]]:
    """Every value that is no container: its path of keys, its container and its last key."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, (dict, list)):
            yield from leaves(value, (*keys, key))
        else:
            yield (*keys, key), node, key


def changed(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return not value
    return value + 'x' if isinstance(value, str) else value * 1.001 + (value == 0)


def differs(cfg: dict, name: str) -> bool:
    try:
        read = read_recipe(cfg)
    except (KeyError, TypeError, ValueError):
        return True  # an unknown name, or a value that cannot be built
    return any(read[group] != RECIPES[name][group] for group in GROUPS)


# --- building ------------------------------------------------------------------------------------


@needs_flop_counter
@all_configs
def test_parameters_and_flops(name):
    """The parameters equal those of the authors' code; both counts equal the metafile's."""
    cfg = copy.deepcopy(load_default(name))
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        model = MODELS.build(cfg.model)
    kind, arch = type(model.backbone).__name__, cfg.model.backbone.get('arch')
    dropped = FACTS['class_token_slot'].get(kind, 0)
    if arch:
        assert count(model.backbone) + dropped == FACTS['backbone_parameters'][kind][arch]
    assert round((count(model) + dropped) / 1e6, 2) == RECIPES[name]['parameters']
    trained = all(parameter.requires_grad for parameter in model.parameters())
    assert trained == (name != 'detr/r50_50e')
    said = metafile_entry(name)['Metadata']
    assert said['Parameters (M)'] == round(count(model) / 1e6, 2)
    sizes = {'mmseg': (512, 512)} | ({'mmdet': (640, 1024)} if name.endswith('_640') else {})
    total, _ = flops.count(model.eval(), sizes.get(cfg.default_scope, (800, 1280)))['']
    assert said['FLOPs (G)'] == round(total / 1e9, 1)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize('name', [name for name in CONFIGS if '_3x' in name or 'detr' in name])
def test_rules_for_single_parameters(name):
    """Swin's rule for norms and DETR's for the backbone match the backbone and no head."""
    cfg = load_default(name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        model = MODELS.build(copy.deepcopy(cfg.model))
    of_backbone = {f'backbone.{name}' for name, _ in model.backbone.named_parameters()}
    norms = {
        f'backbone.{name}.{end}'
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.LayerNorm)
        for end in ('weight', 'bias')
    }
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings = {
        names[parameter]: (group['lr'], group['weight_decay'])
        for group in parameter_groups(model, resolved(name)['optim_wrapper'])
        for parameter in group['params']
    }
    assert set(settings) == {name for name, p in model.named_parameters() if p.requires_grad}
    recipe = RECIPES[name]['optimizer']['optimizer']
    usual = (pytest.approx(recipe['lr']), recipe['weight_decay'])
    special = {name: value for name, value in settings.items() if value != usual}
    if name.startswith('detr/'):
        expected = pytest.approx((1e-5, 1e-4))
        assert special == {name: expected for name in of_backbone & set(settings)}
    else:
        assert special == {name: (1e-4, 0.0) for name in norms if usual[1] == 0.05}


@all_configs
def test_stock_tools_find_backbone_and_hooks(name):
    cfg = load_default(name)
    by_name = {'ClassesByNameHook'} if cfg.default_scope == 'mmdet' else set()
    hooks = {hook.type for hook in cfg.default_hooks.values() if hook}
    assert hooks >= {'DurableCheckpointHook', 'NaNGuardHook'} | by_name
    if cfg.model.backbone.type in ('PVT', 'PVTv2'):
        assert cfg.custom_imports.imports == ['pvt_mm']
        assert not cfg.custom_imports.allow_failed_imports


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('split', SPLITS)
def test_pipelines_build(name, split):
    cfg = load_default(name)
    steps = cfg[f'{split}_dataloader'].dataset.pipeline
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        assert len(Compose(steps).transforms) == len(steps)


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('end', ['', '/'])
@pytest.mark.parametrize('name', KINDS)
def test_an_environment_variable_moves_the_data(name, end, monkeypatch):
    variable = 'ADE_ROOT' if name.startswith('semfpn/') else 'COCO_ROOT'
    default = {'ADE_ROOT': 'data/ade/ADEChallengeData2016', 'COCO_ROOT': 'data/coco'}[variable]
    monkeypatch.setenv(variable, f'/elsewhere/set{end}')
    moved = load(name).to_dict()
    assert default not in str(moved)
    expected = {path.replace(default, '/elsewhere/set') for path in data_paths(resolved(name))}
    assert data_paths(moved) == expected
    assert all(path.startswith('/elsewhere/set/') for path in expected)


def data_paths(cfg: dict) -> set[str]:
    """Every file and folder, joined with its root as mmengine's BaseDataset does."""
    names = {cfg[f'{split}_evaluator'].get('ann_file') for split in ('val', 'test')} - {None}
    for split in SPLITS:
        dataset = cfg[f'{split}_dataloader']['dataset']
        found = [dataset.get('ann_file'), *dataset['data_prefix'].values()]
        names |= {os.path.join(dataset['data_root'], path) for path in found if path}
    return {os.path.normpath(name) for name in names}


@pytest.mark.parametrize(
    ('size', 'expected'),
    [  # height and width; in brackets the result of the first step
        ((512, 683), (512, 704)),
        ((257, 391), (512, 800)),  # (512, 779)
        ((96, 100), (512, 544)),  # (512, 533)
        ((513, 511), (544, 512)),  # (514, 512)
        ((300, 1300), (480, 2048)),  # (473, 2048): the long side decides
        ((1300, 300), (2048, 480)),
        ((512, 1568), (512, 1568)),  # the authors' v1 raises an error
    ],
)
def test_ade20k_is_tested_at_the_official_sizes(size, expected, tmp_path):
    """Long side to at most 2048 and short side to at most 512, then up to multiples of 32."""
    cv2.imwrite(str(tmp_path / 'image.png'), np.zeros((*size, 3), np.uint8))
    cv2.imwrite(str(tmp_path / 'labels.png'), np.ones(size, np.uint8))
    cfg = load_default('semfpn/pvt_s_fpn_40k')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        pipeline = Compose(cfg.test_dataloader.dataset.pipeline)
    sample = pipeline(
        dict(
            img_path=str(tmp_path / 'image.png'),
            seg_map_path=str(tmp_path / 'labels.png'),
            reduce_zero_label=True,
            seg_fields=[],
        )
    )
    assert sample['inputs'].shape == (3, *expected)
    labels = sample['data_samples'].gt_sem_seg.data
    assert labels.shape == (1, *size)  # compared at the image's own size
    assert labels.unique().tolist() == [0]  # reduced by one, once


# --- learning rates ------------------------------------------------------------------------------


def learning_rates(name: str, iterations: int, epoch: int) -> list[float]:
    """The optimizer's learning rate at the start of every iteration."""
    cfg = copy.deepcopy(load_default(name))
    wrapper = build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper)
    schedulers = [
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=wrapper))
        for scheduler in cfg.param_scheduler
    ]
    runner, hook = SimpleNamespace(param_schedulers=schedulers), ParamSchedulerHook()
    wrapper.step()  # otherwise mmengine warns about the order
    rates = []
    for i in range(iterations):
        rates.append(wrapper.get_lr()['lr'][0])
        hook.after_train_iter(runner, i)
        if (i + 1) % epoch == 0:
            hook.after_train_epoch(runner)
    return rates


# mmengine's schedulers make end - begin - 1 steps, mmcv 1.x made end - begin. Hence a linear
# warm-up to 500 has 499 steps, and a decay to 40,000 reaches zero in the last iteration instead of
# after it. The tests compare exactly with mmengine, and with the authors to this difference.


@pytest.mark.parametrize(
    ('name', 'epoch', 'drops'),
    [  # 7330: iterations over the 117,266 images with boxes, 16 at a time
        ('retinanet/pvt_s_fpn_1x', 7330, (8, 11, 12)),
        ('maskrcnn/pvt_v2_b5_fpn_1x', 7330, (8, 11, 12)),
        ('maskrcnn/pvt_v2_b2_fpn_3x', 600, (27, 33, 36)),
        ('sparsercnn/pvt_v2_b2_fpn_3x', 600, (27, 33, 36)),
    ],
)
def test_learning_rates_of_a_detector(name, epoch, drops):
    first, second, epochs = drops
    recipe = RECIPES[name]
    lr, warm_up = recipe['optimizer']['optimizer']['lr'], recipe['schedule']['scheduler'][0]
    steps = warm_up['end'] - warm_up['begin'] - 1
    rates = learning_rates(name, epochs * epoch, epoch)

    def rate(i: int, length: int) -> float:
        regular = lr * 0.1 ** ((i >= first * epoch) + (i >= second * epoch))
        return regular * (1 - (1 - i / length) * (1 - 0.001)) if i < length else regular

    iterations = range(epochs * epoch)
    np.testing.assert_allclose(rates, [rate(i, steps) for i in iterations], rtol=1e-12)
    authors = np.array([rate(i, 500) for i in iterations])
    np.testing.assert_allclose(rates, authors, rtol=0.0021)
    outside = [0, *iterations[500:]]
    np.testing.assert_allclose(np.array(rates)[outside], authors[outside], rtol=1e-12)


def test_learning_rates_of_detr():
    rates = learning_rates('detr/pvt_s_50e', 50 * 10, epoch=10)
    np.testing.assert_allclose(rates[: 33 * 10], 1e-4, rtol=1e-12)  # no warm-up
    np.testing.assert_allclose(rates[33 * 10 :], 1e-5, rtol=1e-12)


def test_learning_rates_of_a_segmentor():
    scheduler = RECIPES['semfpn/pvt_s_fpn_40k']['schedule']['scheduler'][0]
    steps = scheduler['end'] - scheduler['begin'] - 1
    rates = learning_rates('semfpn/pvt_s_fpn_40k', 40000, epoch=50000)
    exact = [2e-4 * (1 - i / steps) ** 0.9 for i in range(40000)]
    authors = [2e-4 * (1 - i / 40000) ** 0.9 for i in range(40000)]
    np.testing.assert_allclose(rates, exact, rtol=1e-9)
    np.testing.assert_allclose(rates, authors, rtol=0, atol=1.5e-8)
    np.testing.assert_allclose(rates[:36000], authors[:36000], rtol=2.1e-4)


# --- metafiles -----------------------------------------------------------------------------------


@functools.cache
def metafile(family: str) -> dict:
    return yaml.safe_load((ROOT / 'configs' / family / 'metafile.yml').read_text(encoding='utf-8'))


def metafile_entry(name: str) -> dict:
    models = metafile(name.split('/')[0])['Models']
    (model,) = [model for model in models if model['Config'] == f'configs/{name}.py']
    return model


def test_model_index_lists_the_metafiles():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    folders = ('backbones', *FAMILIES, 'imagenet')
    assert index == {'Import': [f'configs/{folder}/metafile.yml' for folder in folders]}


@pytest.mark.parametrize('family', FAMILIES)
def test_metafile_has_one_entry_per_config(family):
    configs = sorted(f'configs/{name}.py' for name in CONFIGS if name.startswith(f'{family}/'))
    assert sorted(model['Config'] for model in metafile(family)['Models']) == configs


def backbone_title(backbone: Mapping) -> str:
    """PVT-Tiny, PVTv2-B2-Li, ResNet-50, ResNeXt-101-32x4d."""
    kind = backbone['type'].removesuffix('V1c')
    if 'arch' in backbone:
        return f'{kind}-{backbone["arch"].title().replace("_", "-")}'
    groups = f'-{backbone["groups"]}x{backbone["base_width"]}d' if 'groups' in backbone else ''
    return f'{kind}-{backbone["depth"]}{groups}'


@all_configs
def test_metafile_agrees_with_the_recipe(name):
    family, stem = name.split('/')
    recipe, (collection,) = RECIPES[name], metafile(family)['Collections']
    model = metafile_entry(name)
    assert model['Name'] == f'{family}_{stem}'
    assert model['In Collection'] == collection['Name']
    train, data = recipe['schedule']['train'], recipe['data']
    metadata = collection['Metadata'] | model['Metadata']
    assert metadata.get('Epochs') == train.get('max_epochs')
    assert metadata.get('Iterations') == train.get('max_iters')
    kind = recipe['model']['backbone']['type']
    assert any(kind.startswith(part) for part in metadata['Architecture'])
    optimizer = {'AdamW': 'AdamW', 'SGD': 'SGD with Momentum'}[
        recipe['optimizer']['optimizer']['type']
    ]
    assert metadata['Training Techniques'] == [optimizer, 'Weight Decay']
    checkpoint = recipe['model']['backbone']['init_cfg']['checkpoint']
    assert metadata['Batch Size'] == data['gpus'] * data['train']['batch_size']
    assert metadata['Pretrained Backbone'] == (
        checkpoint if '://' in checkpoint else RELEASES + checkpoint
    )
    base, _, divisor = str(metadata['Learning Rate']).partition(' / ')
    lr = recipe['optimizer']['optimizer']['lr']
    assert float(base) / float(divisor or 1) == pytest.approx(lr, rel=1e-12)
    assert metadata['Backbone'] == backbone_title(recipe['model']['backbone'])
    metrics = {k: v for result in model['Results'] for k, v in result['Metrics'].items()}
    assert metrics | {'source': recipe['published']['source']} == recipe['published']
    expected = 'not reproduced here' if metrics else 'no published result'
    assert expected in model['Source']
    assert 'Weights' not in model  # there is no trained detector or segmentor yet


# --- configs for real images: comparisons of backbones -------------------------------------------

REAL = {
    f'{task}/{head}': sorted(
        f'{task}/{path.stem}'
        for path in (ROOT / f'configs/{task}').glob(f'{head}_*.py')
        if '_from_' not in path.stem
    )
    for task, heads in dict(
        bccd=['retinanet'], nuclei=['retinanet', 'maskrcnn', 'semfpn'], camvid=['semfpn']
    ).items()
    for head in heads
}


PRETRAINED = [
    f'{path.parent.name}/{path.stem}' for path in sorted(ROOT.glob('configs/*/*_from_*.py'))
]


def test_every_config_for_real_images_is_compared():
    assert {*PRETRAINED, *(name for names in REAL.values() for name in names)} == {
        f'{task}/{path.stem}'
        for task in ('bccd', 'nuclei', 'camvid')
        for path in (ROOT / 'configs' / task).glob('*.py')
    }


@pytest.mark.parametrize('head', REAL)
def test_one_recipe_for_all_backbones(head):
    """They differ in the backbone, from random weights, and in the channels of its maps.

    A ResNet's norms are trained, as they would not be by default.
    """
    names = REAL[head]
    found = {name.partition('_')[2]: resolved(name) for name in names}
    assert set(found) == {'pvt_t', 'pvt_v2_b0', 'pvt_v2_b1', 'r18', 'r50'}
    rests = []
    for name, cfg in found.items():
        backbone = cfg['model'].pop('backbone')
        channels = cfg['model']['neck'].pop('in_channels')
        with DefaultScope.overwrite_default_scope(cfg['default_scope']), torch.device('meta'):
            built = MODELS.build(backbone)
            built.train()  # a ResNet's returns None
            maps = built(torch.zeros(1, 3, 64, 64))
        assert [m.shape[1] for m in maps] == channels
        assert backbone.get('init_cfg') is None and backbone.get('pretrained') is None
        if name.startswith('pvt'):
            assert backbone['drop_path_rate'] == 0.0
        else:
            norms = [m for m in built.modules() if isinstance(m, nn.BatchNorm2d)]
            assert all(m.training and m.weight.requires_grad for m in norms) and len(norms) > 15
        assert cfg.pop('load_from') is None
        rests.append(cfg)
    assert all(rest == rests[0] for rest in rests)


@pytest.mark.parametrize('name', PRETRAINED)
def test_pretrained_on_another_task(name):
    """Only the first weights differ; they are the last of the same backbone under another task."""
    scratch, _, task = name.partition('_from_')
    cfg, expected = resolved(name), resolved(scratch)
    init = cfg['model']['backbone'].pop('init_cfg')
    expected['model']['backbone'].pop('init_cfg', None)
    assert cfg == expected
    source = f'{task}/{Path(init["checkpoint"]).parents[1].name}'
    other = resolved(source)
    folder, iterations = Run(f'configs/{source}.py', seed=0).name, other['train_cfg']['max_iters']
    assert init == dict(
        type='Pretrained',
        checkpoint=f'work_dirs/compare/{folder}/iter_{iterations}.pth',
        prefix='backbone.',
    )
    for key in ('type', 'arch', 'depth'):
        assert cfg['model']['backbone'].get(key) == other['model']['backbone'].get(key)


@pytest.mark.parametrize('head', REAL)
def test_the_schedule_ends_with_the_training(head):
    cfg = resolved(REAL[head][0])
    iterations = cfg['train_cfg']['max_iters']
    assert cfg['param_scheduler'][-1]['end'] == cfg['param_scheduler'][-1]['T_max'] == iterations
    assert iterations % cfg['train_cfg']['val_interval'] == 0  # the last weights are validated
    assert iterations % cfg['default_hooks']['checkpoint']['interval'] == 0


@pytest.mark.parametrize('task', ['bccd', 'nuclei', 'camvid'])
def test_data_roots_of_real_images(task, monkeypatch):
    monkeypatch.setenv(f'{task.upper()}_ROOT', '/somewhere')
    for head in (head for head in REAL if head.startswith(task)):
        cfg = load(REAL[head][0])
        for split in SPLITS:
            assert cfg[f'{split}_dataloader'].dataset.data_root == '/somewhere'
            if cfg.default_scope == 'mmdet' and split != 'train':
                file = '/somewhere/annotations/instances_val2017.json'
                assert cfg[f'{split}_evaluator'].ann_file == file
