"""Try trained models on images in a browser, on this computer and without a network.

    python tools/app.py CONFIG CHECKPOINT
    python tools/app.py CONFIG CHECKPOINT --model large CONFIG_2 CHECKPOINT_2

Open the address that it prints, and drop an image on the page: boxes, masks or a label map of each
model, side by side. Sliders, the choice of classes and the downloads of JSON and pictures need no
new prediction; a click on a point shows what a block of the backbone attends to from there.
"""

import argparse
from pathlib import Path

from pvt_mm.app import Limits, create_app, listen, run_server, serve
from pvt_mm.engine import run
from pvt_mm.engine.cli import open_config
from pvt_mm.inference import add_model_arguments


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        '--model',
        nargs=3,
        action='append',
        default=[],
        metavar=('NAME', 'CONFIG', 'CHECKPOINT'),
        help='one more model, beside the first; may be repeated',
    )
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 lets other computers in')
    parser.add_argument('--port', type=int, default=8000, help='0 takes one that is free')
    parser.add_argument('--max-mb', type=float, default=20, help='size of an upload: 20')
    parser.add_argument('--max-megapixels', type=float, default=40, help='of an image: 40')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    common = dict(
        device=args.device, amp=args.amp, compile=args.compile, trust=args.trust_checkpoint
    )
    named = [(Path(args.config).stem, args.config, args.checkpoint), *args.model]
    local = ['127.0.0.1', 'localhost']
    hosts = local if args.host in local else ['*']
    with listen(args.host, args.port) as listener:
        served = []
        for i, (name, config, checkpoint) in enumerate(named):
            cfg = open_config(config)
            if not i:
                cfg.merge_from_dict(args.cfg_options)
            served.append(serve(name, cfg, checkpoint, **common))
        app = create_app(served, Limits(args.max_mb, args.max_megapixels), hosts)
        print(f'http://{args.host}:{listener.getsockname()[1]} (Ctrl-C ends it)', flush=True)
        run_server(app, listener)


if __name__ == '__main__':
    run(main)
