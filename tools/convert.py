"""Write PVT weights in the names of another library, as plain tensors.

    python tools/convert.py pvt_v2_b2 pvt_v2_b2_timm.safetensors --to timm
    python tools/convert.py work_dirs/retinanet/pvt_s_fpn_1x/epoch_12.pth detector.pth --to mmdet
    python tools/convert.py epoch_12.pth backbone.pth --to pvt_mm --backbone

Reads whatever the backbones read: the authors' files, MMDetection's, timm's, Hugging Face's, whole
detectors and segmentors, a name out of pvt_mm.checkpoint.WEIGHTS. What trainers add (optimizer,
schedules, messages) is left out. Of a detector the other tensors are kept as they are, unless
--backbone leaves them out; timm and Hugging Face get the backbone alone.
"""

import argparse
import pickle
import sys
from pathlib import Path

import torch
from torch import Tensor

from pvt_mm.checkpoint import find_checkpoint, read_checkpoint
from pvt_mm.formats import FORMATS, LIBRARIES, from_pvt_mm
from pvt_mm.weights import describe_backbone, find_backbone, unwrap


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('input', help='a file, a URL, or a name like pvt_small')
    parser.add_argument('output', type=Path, help='a new file, .pth or .safetensors')
    parser.add_argument('--to', choices=LIBRARIES, required=True)
    parser.add_argument('--backbone', action='store_true', help='of a detector the backbone alone')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read a file with more than weights in it, which may run code',
    )
    return parser.parse_args()


def convert(content: dict, library: str, backbone_only: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors to write, and a sentence about them."""
    source, prefix, tensors = find_backbone(content)
    if not source:
        raise ValueError(f'no PVT: its first keys are {", ".join(list(unwrap(content))[:4])}')
    written = from_pvt_mm(tensors, library)
    title = f'{describe_backbone(tensors)} from {FORMATS[source].title}'
    others = {
        key: value
        for key, value in unwrap(content).items()
        if not key.startswith(prefix) and isinstance(value, Tensor)
    }
    if prefix.endswith('backbone.') and not backbone_only and library in ('pvt_mm', 'mmdet'):
        return {prefix + k: v for k, v in written.items()} | others, title
    return written, title + (f', without {len(others)} tensors around it' if others else '')


def main() -> None:
    args = parse_args()
    if args.output.suffix not in ('.pth', '.safetensors'):
        sys.exit(f'{args.output}: expected a name that ends in .pth or .safetensors.')
    if args.output.exists():
        sys.exit(f'{args.output} exists: name a new file, or remove it.')
    try:
        content = read_checkpoint(find_checkpoint(args.input), trust=args.trust_checkpoint)
        tensors, title = convert(content, args.to, args.backbone)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        sys.exit(f'{args.input}: {error}')
    # Contiguous and with memory of its own each, as safetensors wants it.
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.suffix == '.safetensors':
        from safetensors.torch import save_file

        save_file(tensors, args.output)
    else:
        torch.save(tensors, args.output)
    print(f'{args.output}: {title}, {len(tensors)} tensors in the names of {args.to}')


if __name__ == '__main__':
    main()
