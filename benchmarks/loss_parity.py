"""Compare the losses of RetinaNet with our PVT-Tiny and with MMDetection's, eps mended.

    COCO_ROOT=data/coco/ python -m benchmarks.loss_parity [--iterations 20]

Both models start from the same weights and see the same images in the same order, without
drop-path. The exit status is 1 if a loss differs by more than 1e-4 of its value.
"""

import argparse
import sys

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner, set_random_seed

from pvt_mm.engine import check_data, import_host

from .speed.peers import builtin

TOLERANCE = 1e-4


def losses(model: torch.nn.Module, cfg: Config, iterations: int) -> list[float]:
    """Train with the config's own data, optimizer and warm-up."""
    set_random_seed(0)
    loader = iter(Runner.build_dataloader(cfg.train_dataloader, seed=0))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    warm_up = PARAM_SCHEDULERS.build(cfg.param_scheduler[0] | dict(optimizer=wrapper))
    model.train()
    result = []
    for _ in range(iterations):
        logged = model.train_step(next(loader), wrapper)
        warm_up.step()
        result.append(logged['loss'].item())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default='configs/overfit/retinanet.py')
    parser.add_argument('--iterations', type=int, default=20)
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    check_data(cfg, ['train'])
    import_host('mmdet')
    init_default_scope('mmdet')
    from mmdet.registry import MODELS

    ours = MODELS.build(cfg.model)
    ours.init_weights()
    theirs = MODELS.build(cfg.model)
    theirs.load_state_dict(ours.state_dict())
    theirs.backbone = builtin(ours.backbone)

    pairs = list(zip(*(losses(m, cfg, args.iterations) for m in (ours, theirs)), strict=True))
    differences = [abs(a - b) / b for a, b in pairs]
    print('iteration   ours        MMDetection   relative difference')
    for i, ((a, b), difference) in enumerate(zip(pairs, differences, strict=True), 1):
        print(f'{i:9}   {a:.8f}  {b:.8f}    {difference:.1e}')
    sys.exit(max(differences) > TOLERANCE)


if __name__ == '__main__':
    main()
