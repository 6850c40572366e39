"""The hooks and functions that a config can name."""

import contextlib
import operator
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import MODELS
from torch import nn

from pvt_mm import PVTv2
from pvt_mm.engine.hooks import (
    CompileBackboneHook,
    CompleteCheckpointHook,
    DataWaitHook,
    Float32OperatorsHook,
    check_complete,
)

from ..conftest import ROOT
from .toys import Toy, toy_runner


@pytest.mark.slow
def test_importing_the_package_registers_what_a_config_can_name():
    code = """
import sys, pvt_mm
from mmengine.registry import FUNCTIONS, HOOKS, METRICS, MODELS
for registry, names in (
    (MODELS, ['PVT', 'PVTv2']),
    (METRICS, ['FastCocoMetric']),
    (FUNCTIONS, ['wrap_pvt_blocks']),
    (HOOKS, ['BriefingHook', 'ClassesByNameHook', 'CompileBackboneHook']),
    (HOOKS, ['CompleteCheckpointHook']),
    (HOOKS, ['DataWaitHook', 'PeakMemoryHook', 'UnreadableImagesHook']),
):
    for name in names:
        assert registry.module_dict[name].__module__.startswith('pvt_mm.'), name
print({'mmcv', 'mmdet', 'mmseg'} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'set()\n', done.stderr


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s, None),
        (lambda s: {f'module.{k}': v for k, v in s.items()} | {'more': torch.zeros(1)}, None),
        (
            lambda s: {k: v for k, v in s.items() if k.startswith('backbone.')},
            r'3 of the 3 tensors of this Detector outside its backbone \(neck, head x 2\): '
            r'an ImageNet classifier, or a backbone alone, cannot be tested',
        ),
        (
            lambda s: s | {'head.weight': torch.zeros(3, 2)},
            r'1 of the 3 .* \(head\): use the config that it was trained with',
        ),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith('backbone.block1.1.norm')},
            r'lacks 4 tensors of the backbone .*, first backbone\.block1\.1\.norm1\.bias: test a ',
        ),
    ],
)
@pytest.mark.parametrize('by_hook', [True, False])
def test_a_checkpoint_to_test_has_to_be_complete(change, message, by_hook):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = PVTv2('b0', out_indices=0)
            self.neck = nn.PReLU()
            self.head = nn.Linear(2, 1, bias=False)
            self.head.register_buffer('mean', torch.zeros(1))

    model = Detector()
    checkpoint = dict(state_dict=change(model.state_dict()), meta={})
    with pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext():
        if by_hook:
            runner = SimpleNamespace(model=model)
            CompleteCheckpointHook().after_load_checkpoint(runner, checkpoint)
        else:
            check_complete(model, checkpoint)


def test_memory_is_that_of_the_process(tmp_path):
    runner = toy_runner(tmp_path)
    runner.train()
    logged = runner.message_hub.get_scalar('train/memory').current()
    with open('/proc/self/status') as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))
    assert logged == pytest.approx(peak / 1024, rel=0.05)


class SlowData(list):
    """Keeps the model waiting."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


@pytest.mark.parametrize('slow', [True, False])
def test_training_that_waits_for_its_data_warns_once(slow, tmp_path, capfd):
    runner = toy_runner(tmp_path, [DataWaitHook(interval=2)], max_epochs=4)
    if slow:
        runner._train_dataloader['dataset'] = SlowData([dict(x=torch.ones(1))] * 8)
    else:
        runner.model.forward = slowly(runner.model.forward)
    runner.train()
    found = re.findall(
        r'waits for its data: 0\.\d\d of the 0\.\d\d s .*num_workers \(now 0; \d+ CPUs here\)',
        ''.join(capfd.readouterr()),
    )
    assert len(found) == slow


def slowly(function):
    def after_a_while(*args, **kwargs):
        time.sleep(0.2)  # many times the time of loading on a busy machine
        return function(*args, **kwargs)

    return after_a_while


def test_compiling_the_backbone_alone(tmp_path):
    class Backbone(nn.Module):
        def forward(self, x):
            return x + 1

    class WithBackbone(Toy):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()

        def forward(self, x, mode='tensor'):
            return super().forward(self.backbone(x), mode)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    compiled = []
    hook = dict(type='CompileBackboneHook', backend=backend)
    runner = toy_runner(tmp_path, [hook], max_epochs=1, model=WithBackbone())
    runner.train()
    assert len(compiled) == 1
    operators = [node.target for node in compiled[0].graph.nodes if node.op == 'call_function']
    assert operators == [operator.add]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_mmcvs_operators_get_float32_in_place_of_bfloat16(dtype):
    """RoIAlign and the focal loss; regions keep their corners. float16 is left to MMDetection."""
    extractor = MODELS.build(
        dict(
            type='mmdet.SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=4,
            featmap_strides=[4, 8],
        )
    )
    loss = MODELS.build(dict(type='mmdet.FocalLoss'))
    model = nn.ModuleList([extractor, loss, nn.ReLU()])
    wrapper = AmpOptimWrapper.__new__(AmpOptimWrapper)  # its constructor needs a GPU
    wrapper.cast_dtype = dtype
    Float32OperatorsHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    seen = []
    for layer in extractor.roi_layers:
        layer.register_forward_pre_hook(lambda _, args: seen.extend(args))
    maps = [torch.randn(1, 4, side, side) for side in (200, 100)]
    rois = torch.tensor([[0, 300.0, 301.0, 331.0, 337.0], [0, 101.0, 103.0, 707.0, 741.0]])
    logits, labels = torch.randn(8, 3), torch.randint(0, 4, (8,))
    if dtype == torch.float16:
        assert not extractor._forward_pre_hooks and not loss._forward_pre_hooks
        return
    halves = tuple(x.to(dtype) for x in maps)
    assert torch.equal(extractor(halves, rois), extractor(tuple(x.float() for x in halves), rois))
    assert {x.dtype for x in seen} == {torch.float32}
    assert torch.equal(torch.cat([x for x in seen if x.dim() == 2])[:2], rois)
    found = loss(pred=logits.to(dtype), target=labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(logits.to(dtype).float(), labels))
    assert model[2](logits.to(dtype)).dtype == dtype


def test_every_backbone_is_compiled(monkeypatch):
    """Also those of a teacher and a student, which are not at model.backbone."""
    compiled, given = [], []
    monkeypatch.setattr(
        nn.Module, 'compile', lambda self, **options: (compiled.append(self), given.append(options))
    )
    parts = [nn.ModuleDict(dict(backbone=nn.Linear(1, 1), neck=nn.Linear(1, 1))) for _ in range(2)]
    model = nn.ModuleDict(dict(student=parts[0], teacher=parts[1]))
    runner = SimpleNamespace(model=model, logger=SimpleNamespace(info=lambda _: None))
    CompileBackboneHook().before_run(runner)
    assert compiled == [part['backbone'] for part in parts]
    assert given == [dict(dynamic=True, options=dict(layout_optimization=False))] * 2
    CompileBackboneHook(mode='max-autotune').before_run(runner)  # torch takes one of the two
    assert given[2:] == [dict(dynamic=True, mode='max-autotune')] * 2


@pytest.mark.parametrize(
    ('version', 'options', 'warns'),
    [('2.13.0', {}, True), ('2.13.0', dict(backend='eager'), False), ('2.11.0', {}, False)],
)
def test_training_that_is_compiled_for_each_size(version, options, warns, monkeypatch):
    told = []
    runner = SimpleNamespace(logger=SimpleNamespace(warning=told.append))
    monkeypatch.setattr(torch, '__version__', version)
    CompileBackboneHook(**options).before_train(runner)
    expected = ['torch 2.13.0 compiles training anew for each size of images'] if warns else []
    assert [line.partition(',')[0] for line in told] == expected
