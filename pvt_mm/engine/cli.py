"""The first lines of every tool: arguments, config, hosts, models, safe reading of checkpoints."""

import argparse
import contextlib
import gc
import importlib
import io
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.utils import digit_version
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ..data import coco
from ..data.check import check
from ..data.classes import name_of
from ..data.keys import check_keys
from ..data.loading import DataError
from ..data.paths import check_data
from ..data.recipe import check_pretrained
from ..data.report import Problem, describe_counts, ordered, print_table
from ..data.structure import check_structure
from ..environment import HOSTS, explain, find_problems, leave_out_multimodal
from ..weights import find_checkpoint, read_checkpoint
from ..weights.names import select, unwrap
from .errors import TrainingStopped, UsageError
from .trackers import TRACKERS, add_trackers

# Messages that do not help a user of our configs: about packages that these do not need, and about
# defaults that are part of the recipes.
_WARNED = (
    'pkg_resources is deprecated as an API',
    'faster_coco_eval is not installed',
    'Default ``avg_non_ignore`` is False',
    '`broadcast_buffers` is deprecated',
    '`reduce_zero_label` will be deprecated',
    'The draw is False, it means that the hook for visualization',
    r'Warning: The (bbox|polygon) is out of bounds',
)
_PRINTED = ('Could not import OneDL',)


def run(main: Callable[[], None]) -> None:
    """Run the main function of a tool; an error for users exits with its message alone.

    torchrun learns the message. Only the first of its processes on a machine prints it as well,
    since mostly all of them have the same error.

    Raises:
        SystemExit: with code 1 after a UsageError or TrainingStopped, with 128 + N after signal N,
            such as 130 after Ctrl-C.
    """
    code = 0
    try:
        main()
    except (UsageError, TrainingStopped, DataError) as error:
        recorded = 'TORCHELASTIC_ERROR_FILE' in os.environ
        if recorded:
            get_error_handler().record_exception(error)
        sys.exit(1 if recorded and os.environ.get('LOCAL_RANK', '0') != '0' else str(error))
    except KeyboardInterrupt as stopped:  # at once, without waiting for other processes
        sys.exit(128 + (stopped.args or (signal.SIGINT,))[0])
    except SystemExit as stopped:
        code = stopped.code
    if dist.is_initialized():
        _leave_group()
    if code:
        sys.exit(code)


@contextlib.contextmanager
def end_on_sigterm() -> Iterator[None]:
    """SIGTERM, of ``timeout`` or a scheduler, ends a tool like Ctrl-C: it completes its files.

    Not for a tool of several processes: one that waits for another could not be ended.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave_group() -> None:
    """Leave the process group, and end its threads, while Python can still do so.

    A thread of gloo may hold tensors of the last broadcast. It needs the GIL to release them, and
    aborts the process if Python is ending. A group joins its threads when nothing refers to it;
    the model of the finished run, which is part of a reference cycle, still does.
    """
    if digit_version(torch.__version__) >= digit_version('2.2'):  # before, this may hang
        gc.collect()
        dist.destroy_process_group()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that tools/train.py and tools/test.py have in common."""
    parser.add_argument('--work-dir', help='default: work_dirs/FOLDER/NAME of the config')
    add_config_options(parser)
    parser.add_argument(
        '--compile', action='store_true', help='torch.compile the backbone, for all image sizes'
    )
    parser.add_argument(
        '--tracker',
        action='append',
        choices=TRACKERS,
        default=[],
        help='write the curves there too, offline; may be repeated',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    add_trust_argument(parser)
    # torch.distributed.launch passes it; torchrun sets the environment variable.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every tool that reads a config and its data."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        default={},
        help='change the config: a.b=1 c="[x,y]"',
    )
    parser.add_argument(
        '--no-check',
        nargs='*',
        metavar='KIND',
        help='do not check the data first; with KINDs of the table: these errors are warnings',
    )


class OptionsAction(DictAction):
    """mmengine's DictAction, with a sentence for what it cannot parse."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        for word in values:
            try:
                super().__call__(parser, argparse.Namespace(), [word], option_string)
            except (ValueError, AssertionError, RecursionError) as error:
                told = f'{word!r}, expected KEY=VALUE with matching brackets and quotes'
                raise argparse.ArgumentError(self, told) from error
        super().__call__(parser, namespace, values, option_string)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``, for every tool that reads a checkpoint."""
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints with more than weights in them, which may run code',
    )


def load_config(args: argparse.Namespace, splits: Sequence[str] = ()) -> Config:
    """Read the config of a tool, check its data, import its host, install the safe loader.

    Args:
        args: With ``config`` and the arguments that :func:`add_arguments` adds.
        splits: The splits that the tool reads, see :func:`check_data`.

    Raises:
        UsageError: the installation, the config or the data does not work.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options, splits)
    cfg.launcher = args.launcher
    if args.compile:
        add_hook(cfg, 'CompileBackboneHook')
    path = Path(args.config).resolve()  # with its folder: tasks share the names of files
    default = os.path.join('work_dirs', path.parent.name, path.stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or default
    check_folder(cfg.work_dir, '--work-dir')
    if args.tracker:
        add_trackers(cfg, args.tracker)
    _fit_loaders(cfg)
    # Of several processes one looks; if it stops, the launcher stops the others.
    ranks = (os.environ.get(name) for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'))
    is_first = next(filter(None, ranks), '0') == '0'
    if splits and args.no_check != [] and is_first:
        problems = [*check_keys(cfg, args.cfg_options), *check(cfg, splits)]
        report_problems(problems, args.no_check or ())
    install_safe_loader(args.trust_checkpoint)
    return cfg


def add_hook(cfg: Config, name: str) -> None:
    """Add a hook to a config that does not have it."""
    hooks = cfg.get('custom_hooks') or []
    if name not in {name_of(hook['type']) for hook in hooks}:
        cfg.custom_hooks = [*hooks, dict(type=name)]


def read_config(path: str | Path, options: dict, splits: Sequence[str] = ()) -> Config:
    """Read a config, check that its data exists, import its host.

    Args:
        path: A file.
        options: Values by key, see ``Config.merge_from_dict``.
        splits: The splits that the tool reads, see :func:`check_data`.

    Raises:
        UsageError: the installation, the config or the data does not work.
    """
    if problems := list(find_problems()):
        raise UsageError('\n'.join(problems))
    cfg = open_config(path)
    try:
        cfg.merge_from_dict(options)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(f'--cfg-options: {path} has no such key: {error}.') from error
    if wrong := [*check_structure(cfg, splits), *check_pretrained(cfg)]:
        raise UsageError('\n'.join(map(str, wrong)))
    try:
        check_data(cfg, splits)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    import_host(cfg.default_scope)
    return cfg


def report_problems(problems: Sequence[Problem], lenient: Sequence[str] = ()) -> None:
    """Print what a check has found.

    Args:
        problems: Those found.
        lenient: Kinds of errors that are to be warnings.

    Raises:
        UsageError: there is an error.
    """
    found = ordered(problems, lenient)
    if found:
        print_table(found)
    errors = [problem for problem in found if problem.level == 'error']
    if errors:
        kinds = ' '.join(dict.fromkeys(problem.kind for problem in errors))
        raise UsageError(
            f'{describe_counts(errors)} in the data or the config, see the table: correct them, or '
            f'pass --no-check {kinds} if they are meant.'
        )


def check_folder(folder: str | Path, option: str) -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Args:
        folder: A path.
        option: What names it, for the message.

    Raises:
        UsageError: a file is in its place, or it must not be written to.
    """
    path = Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise UsageError(f'{option} {folder}: {there} is a file, expected a folder: name another.')
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(
            f'{option} {folder}: {there} must not be written to: change its permissions, or name '
            f'another folder.'
        )


def _fit_loaders(cfg: Config) -> None:
    """Leave out what torch refuses for a DataLoader without workers."""
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if loader and not loader.get('num_workers'):
            for key in ('persistent_workers', 'prefetch_factor', 'multiprocessing_context'):
                loader.pop(key, None)
            if loader.get('timeout'):
                loader.timeout = 0


def open_config(path: str | Path) -> Config:
    """Read a config and its default scope, without its data and its host.

    Raises:
        UsageError: there is no such file, or it names no host.
    """
    if not os.path.isfile(path):
        raise UsageError(f'{path} is no file (from {os.getcwd()}), expected a config.')
    if Path(path).suffix not in ('.py', '.yml', '.yaml', '.json'):
        raise UsageError(f'{path} is no config, expected a file *.py (or *.yaml, *.json).')
    ignore_warnings()
    cfg = Config.fromfile(path)
    if not cfg.get('default_scope'):  # of a pure Python config the classes tell
        module = getattr((cfg.get('model') or {}).get('type'), '__module__', '')
        cfg.default_scope = module.partition('.')[0]
    if not cfg.default_scope:
        expected = ' or '.join(map(repr, HOSTS))
        raise UsageError(f'{path} has no default_scope, expected {expected}.')
    return cfg


def install_safe_loader(trust: bool = False) -> None:
    """Make mmengine read every checkpoint with :func:`pvt_mm.weights.read_checkpoint`.

    mmengine's own reader unpickles anything if reading the weights alone fails. mmengine still
    resolves its schemes (``open-mmlab://``, ``torchvision://``, ``s3://``, ...), but the functions
    that all of them read with are replaced. A path may also be a name in WEIGHTS.

    Args:
        trust: Unpickle anything that a file contains.
    """

    def read(file: str | io.BytesIO, map_location: Any = None, **options: Any) -> dict:
        if not isinstance(file, io.BytesIO):
            return for_mmengine(read_checkpoint(file, map_location, trust))
        with tempfile.TemporaryDirectory() as folder:  # from a remote file system
            path = Path(folder, 'remote.pth')
            path.write_bytes(file.getbuffer())
            return for_mmengine(read_checkpoint(path, map_location, trust))

    def load_url(url: str, map_location: Any = None, **options: Any) -> dict:
        return read(find_checkpoint(url), map_location)

    def load_from_local(path: str, map_location: Any = None) -> dict:
        return read(find_checkpoint(os.path.expanduser(path)), map_location)

    class Torch:
        """The module torch, but for its ``load``."""

        load = staticmethod(read)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    mmengine_checkpoint.torch = Torch()  # upstream's loaders call torch.load
    mmengine_checkpoint._safe_torch_load = read  # the forks' loaders call this
    mmengine_checkpoint.load_url = load_url
    mmengine_checkpoint.CheckpointLoader.register_scheme('', load_from_local, force=True)


def for_mmengine(content: Mapping) -> Mapping:
    """The content of a file with its tensors where mmengine expects them.

    mmengine also removes the ``module.`` of DataParallel, but not from the metadata.
    """
    tensors = unwrap(content)
    if inner := select(tensors, 'module.'):
        inner.update({k: v for k, v in tensors.items() if not k.startswith('module.')})
        tensors = inner
    if tensors is content or tensors is content.get('state_dict'):
        return content
    return {**(content if 'state_dict' in content else {}), 'state_dict': tensors}


def ignore_warnings() -> None:
    """Hide the warnings of the hosts that do not help a user of our configs."""
    for message in _WARNED:
        warnings.filterwarnings('ignore', message=message)


def import_host(scope: str) -> None:
    """Import a host and register its modules, without the messages that do not help.

    Raises:
        UsageError: the host or one of its dependencies is missing or does not fit, with the repair.
        Exception: the host cannot be imported for another reason.
    """
    ignore_warnings()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            left_out = leave_out_multimodal()
            if left_out and scope == 'mmpretrain':
                print(left_out)
            utils = importlib.import_module(f'{scope}.utils')
            utils.register_all_modules(init_default_scope=False)
    except Exception as error:
        told = explain(scope, error) if scope in HOSTS else None
        if not told:
            raise
        raise UsageError(told) from error
    for line in printed.getvalue().splitlines():
        if not line.startswith(_PRINTED):
            print(line)
    if scope == 'mmdet':
        coco.install()
