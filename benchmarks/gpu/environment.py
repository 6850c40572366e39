"""Describe the machine and the code that is tried on it."""

import argparse
import datetime
import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.files import write_json

ROOT = Path(__file__).resolve().parents[2]
MODEL = ('pvt.py', 'cpu.py', 'archs.py')  # the files that decide what runs on a GPU
PACKAGES = (
    *('torch', 'triton', 'numpy', 'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection'),
    *('onedl-mmsegmentation', 'timm', 'transformers', 'opencv-python-headless'),
)


def model_digest() -> str:
    """The first digits of a hash of the model's source; results are of the code with this one."""
    text = b''.join((ROOT / 'pvt_mm' / name).read_bytes() for name in MODEL)
    return hashlib.sha256(text).hexdigest()[:12]


def describe() -> dict:
    found = dict(
        date=datetime.date.today().isoformat(),
        model=model_digest(),
        python=platform.python_version(),
        cpus=os.cpu_count(),
        packages={},
        device='CPU',
    )
    for name in PACKAGES:
        try:
            found['packages'][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found['packages'][name] = None
    found['packages']['torch'] = torch.__version__
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= dict(
            device=card.name,
            capability='{}.{}'.format(*torch.cuda.get_device_capability()),
            memory_gib=round(card.total_memory / 2**30, 1),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            nccl='.'.join(map(str, torch.cuda.nccl.version())),
            driver=subprocess.run(
                ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
                **dict(capture_output=True, text=True),
            ).stdout.strip(),
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--json', type=Path, required=True)
    args = parser.parse_args()
    found = describe()
    write_json(args.json, found)
    print(found)


if __name__ == '__main__':
    main()
