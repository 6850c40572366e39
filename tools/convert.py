"""Convert PVT weights to the names of another library.

    python tools/convert.py pvt_v2_b2 pvt_v2_b2_timm.safetensors --to timm
    python tools/convert.py work_dirs/retinanet/pvt_s_fpn_1x/epoch_12.pth detector.pth --to mmdet
    python tools/convert.py epoch_12.pth backbone.pth --to pvt_mm --backbone
    python tools/convert.py pvt_small classifier.pth --to mmpretrain

Reads every file that the backbones read: the authors' files, MMDetection's, timm's, Hugging Face's,
whole detectors and segmentors, and the names in pvt_mm.weights.WEIGHTS. Writes plain tensors,
without the records of trainers (optimizer, schedules, messages). The other tensors of a detector
are kept as they are, unless --backbone is given; timm and Hugging Face get the backbone alone. An
ImageNet classifier keeps its head, unless --backbone is given or for MMDetection.
"""

import argparse
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from pvt_mm.engine.cli import add_trust_argument
from pvt_mm.weights import find_checkpoint, read_checkpoint
from pvt_mm.weights.files import write_checkpoint
from pvt_mm.weights.fit import describe_backbone
from pvt_mm.weights.names import (
    FORMATS,
    HEAD,
    LIBRARIES,
    find_backbone,
    find_sources,
    from_pvt_mm,
    recorded_grids,
    unwrap,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('input', help='a file, a URL, or a name like pvt_small')
    parser.add_argument('output', type=Path, help='a new file, .pth or .safetensors')
    parser.add_argument('--to', choices=LIBRARIES, required=True)
    parser.add_argument(
        '--prefix', default='', help='of the backbone, if there are several: teacher.backbone'
    )
    parser.add_argument('--backbone', action='store_true', help='write only the backbone')
    add_trust_argument(parser)
    return parser.parse_args()


def convert(
    content: dict, library: str, backbone_only: bool, prefix: str = ''
) -> tuple[dict[str, Tensor], str]:
    """The tensors to write, with the recorded grids of position embeddings, and a description."""
    source, prefix, tensors = find_backbone(content, prefix)
    if not source:
        raise ValueError(f'no PVT: its first keys are {", ".join(list(unwrap(content))[:4])}')
    is_classifier = 'head.weight' in tensors
    if backbone_only:
        for key in ('head.weight', 'head.bias'):
            tensors.pop(key, None)
    written = OrderedDict(from_pvt_mm(tensors, library))
    title = f'{describe_backbone(tensors)} from {FORMATS[source].title}'
    others = {
        key: value
        for key, value in unwrap(content).items()
        if not key.startswith(prefix) and isinstance(value, Tensor) and not HEAD.match(key)
    }
    is_detector = prefix.endswith('backbone.') and not is_classifier
    if is_detector and not backbone_only and library in ('pvt_mm', 'mmdet'):
        written = OrderedDict({prefix + k: v for k, v in written.items()} | others)
    elif others:
        title += f', without {len(others)} tensors around it'
    if grids := recorded_grids(tensors):
        [(_, written_prefix)] = find_sources(written)
        written._metadata = {written_prefix.rstrip('.'): dict(pos_grids=grids)}
    return written, title


def main() -> None:
    args = parse_args()
    if args.output.suffix not in ('.pth', '.safetensors'):
        sys.exit(f'{args.output}: expected a name that ends in .pth or .safetensors.')
    if args.output.exists():
        sys.exit(f'{args.output} exists: name a new file, or remove it.')
    try:
        content = read_checkpoint(find_checkpoint(args.input), trust=args.trust_checkpoint)
        tensors, title = convert(content, args.to, args.backbone, args.prefix)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        sys.exit(f'{args.input}: {error}')
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(tensors, args.output)
    print(f'{args.output}: {title}, {len(tensors)} tensors in the names of {args.to}')


if __name__ == '__main__':
    main()
