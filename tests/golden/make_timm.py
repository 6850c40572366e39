"""Write timm.npz: the names of timm's PVTv2 weights, and outputs of its models in float64.

The numbers are stored for environments without timm, such as that of torch 2.1:

    python3.11 -m venv timm && timm/bin/pip install timm==1.0.31
    timm/bin/python -m tests.golden.make_timm

Every tensor is ``fill(name, shape)`` with timm's name, the input is ``image(64, 96)``.

    ARCH/names, ARCH/shapes       of the classifier's state dict; shapes end with zeros
    ARCH/feature_names            of timm.create_model(..., features_only=True)
    ARCH/stageN/values            the flattened output at probe(size, 64, 96, N), N = 1..4
    ARCH/stageN/mean_std_l2       of the whole output
"""

from pathlib import Path

import numpy as np
import timm
import torch

from .fill import fill, image, probe


def main() -> None:
    golden = {}
    for arch in ('pvt_v2_b0', 'pvt_v2_b2_li'):
        model = timm.create_model(arch).double().eval()
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        golden[f'{arch}/names'] = np.array(list(shapes))
        golden[f'{arch}/shapes'] = np.array([s + (0,) * (4 - len(s)) for s in shapes.values()])
        features = timm.create_model(arch, features_only=True)
        golden[f'{arch}/feature_names'] = np.array(list(features.state_dict()))
        model.load_state_dict({k: torch.from_numpy(fill(k, s)) for k, s in shapes.items()})
        maps = []
        for stage in model.stages:
            stage.register_forward_hook(lambda module, args, output, maps=maps: maps.append(output))
        with torch.no_grad():
            model(torch.from_numpy(image(64, 96)))
        for stage, found in enumerate(maps, 1):
            found = found.flatten()
            values = found[probe(found.numel(), 64, 96, stage)]
            golden[f'{arch}/stage{stage}/values'] = values.numpy()
            whole = torch.stack([found.mean(), found.std(correction=0), found.norm()])
            golden[f'{arch}/stage{stage}/mean_std_l2'] = whole.numpy()
    np.savez_compressed(Path(__file__).parent / 'timm.npz', **golden)
    print(f'timm {timm.__version__}, torch {torch.__version__}: {len(golden)} arrays')


if __name__ == '__main__':
    main()
