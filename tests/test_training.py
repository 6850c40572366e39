"""Compiled, accumulated, on two processes or sharded: the same weights as plain training."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner

from pvt_mm import PVT, PVTv2
from pvt_mm.engine import ToolRunner, UsageError, install_safe_loader
from pvt_mm.engine.resume import find_newest

from .conftest import SHALLOW, not_on_torch_2_1, randomise
from .scripts import START_METHOD

SIDES = [(64, 64), (64, 96), (96, 64)]  # of the images of each iteration
DDP = dict(cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', static_graph=True)))
FSDP = dict(
    strategy=dict(
        type='FSDPStrategy',
        model_wrapper=dict(
            type='MMFullyShardedDataParallel',
            device_id='cpu',
            auto_wrap_policy='wrap_pvt_blocks',
        ),
    )
)


class Classifier(BaseModel):
    def __init__(self, cls: type) -> None:
        super().__init__()
        self.backbone = randomise(cls(SHALLOW, drop_path_rate=0.0, with_cp=True))

    def init_weights(self) -> None:
        """Keep the weights, which are the same in all processes."""

    def forward(self, x, mode='tensor'):
        return dict(loss=sum(y.square().mean() for y in self.backbone(x)))


def train(cls, work_dir, processes=1, accumulate=1, epochs=1, runner=ToolRunner, **kwargs):
    """Gradient descent; each step sees four images, on one process or on several."""
    torch.manual_seed(0)
    images = [torch.randn(3, *side) for side in SIDES for _ in range(4)]
    made = runner(
        model=Classifier(cls),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4 // processes // accumulate,
            collate_fn=dict(type='default_collate'),
            dataset=[dict(x=image) for image in images],
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=1e-2, momentum=0.9),
            accumulative_counts=accumulate,
        ),
        default_hooks=dict(logger=None, checkpoint=dict(type='DurableCheckpointHook', interval=1)),
        experiment_name=work_dir.name,  # mmengine keeps a logger for each
        **kwargs,
    )
    made.train()
    return made.model


def train_in_a_group(rank, port, cls, work_dir, kwargs):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    model = train(cls, work_dir, processes=2, launcher='pytorch', **kwargs)
    if 'strategy' in kwargs:
        with model.summon_full_params(model):
            state = {k.replace('_fsdp_wrapped_module.', ''): p for k, p in model.named_parameters()}
            torch.save(state, work_dir / f'{rank}.pth')
    else:
        torch.save(model.module.state_dict(), work_dir / f'{rank}.pth')
    # In this order: otherwise the group is destroyed with the model, and waits for a thread that
    # waits for the GIL.
    del model
    dist.barrier()
    dist.destroy_process_group()


def check_weights(one, two, cls):
    before = Classifier(cls).state_dict()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(two[key], value, rtol=1e-4, atol=1e-6), key
        assert not torch.equal(value, before[key]), key


@not_on_torch_2_1('cannot compile checkpoints')
@pytest.mark.slow
def test_a_compiled_backbone_trains_the_same_at_all_sizes(tmp_path):
    torch._dynamo.reset()
    hook = dict(type='CompileBackboneHook', backend='eager')
    compiled = train(PVT, tmp_path / 'compiled', custom_hooks=[hook])
    plain = train(PVT, tmp_path / 'plain')
    assert compiled.backbone._compiled_call_impl and not plain.backbone._compiled_call_impl
    check_weights(plain.state_dict(), compiled.state_dict(), PVT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('cls', 'kwargs'),
    [
        (PVT, DDP),
        (PVTv2, dict(accumulate=2)),
        pytest.param(
            *(PVT, FSDP | dict(runner=FlexibleRunner)),
            marks=not_on_torch_2_1('has no FSDP without a GPU'),
        ),
    ],
    ids=['static graph', 'accumulation', 'fsdp'],
)
def test_two_processes_train_the_same_weights_as_one(cls, kwargs, tmp_path, free_port):
    one = train(cls, tmp_path / 'one').state_dict()
    arguments = free_port, cls, tmp_path, kwargs
    mp.start_processes(train_in_a_group, arguments, nprocs=2, start_method=START_METHOD)
    for rank in range(2):
        check_weights(one, torch.load(tmp_path / f'{rank}.pth'), cls)
    install_safe_loader()
    path, _ = find_newest(tmp_path)
    assert path == tmp_path / 'epoch_1.pth'
    if path.is_dir():  # one file per process, complete or not to be used
        assert sorted(f.name for f in path.iterdir()) == ['processes', 'rank0.pth', 'rank1.pth']
        (path / 'rank1.pth').unlink()
        with pytest.raises(UsageError, match='is incomplete: it has 1 files, expected 2'):
            find_newest(tmp_path)
