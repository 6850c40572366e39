"""What a work dir tells about a training, also while it still runs."""

import inspect
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from ..engine.errors import UsageError

# Values of a validation or a training record that are no metrics and no losses.
_OTHERS = ('time', 'data_time', 'step', 'iter', 'epoch', 'lr', 'memory', 'grad_norm')
_SECTION = re.compile(r'System environment:\n(.*?)\n-{20,}\n', re.DOTALL)
MISSING = '(not set)'


@dataclass
class Run:
    """A work dir.

    Attributes:
        folder, name: Its path, and the end of it that tells it from the others.
        records: What the training has logged, by iteration: ``loss``, ``lr``, ``time``, ...
        validations: (iteration, metrics) of each validation.
        tests: The metrics of the last test.
        cfg: The config of the training, None if there is none.
        config: The file of the config.
        source: The file that the training was started with, None if it is not known.
        commands: Those that wrote into the work dir.
        environment: What the log says about the machine and the versions.
        updated: When the last record was written, in seconds since 1970.
    """

    folder: Path
    name: str
    records: list[dict] = field(default_factory=list)
    validations: list[tuple[int, dict]] = field(default_factory=list)
    tests: dict[str, float] = field(default_factory=dict)
    cfg: Config | None = None
    config: Path | None = None
    source: Path | None = None
    commands: list[str] = field(default_factory=list)
    environment: str = ''
    updated: float = 0.0

    @property
    def max_iters(self) -> int | None:
        """The iterations of the whole training, if they can be told."""
        training = (self.cfg.get('train_cfg') if self.cfg else None) or {}
        if training.get('max_iters'):
            return training['max_iters']
        last = self.records[-1] if self.records else {}
        if not training.get('max_epochs') or not last.get('epoch'):
            return None
        finished = [r for r in self.records if r.get('epoch') == 2]
        length = finished[0]['iter'] - 1 if finished else None
        return length and training['max_epochs'] * length

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(iteration, value) of the training."""
        return [(r['iter'], r[key]) for r in self.records if _is_number(r.get(key))]

    def validation_curve(self, key: str) -> list[tuple[int, float]]:
        """(iteration, value) of the validation."""
        return [(i, record[key]) for i, record in self.validations if _is_number(record.get(key))]

    def losses(self) -> list[str]:
        """The parts of the loss."""
        keys = dict.fromkeys(key for record in self.records for key in record)
        return [key for key in keys if 'loss' in key and key != 'loss']

    def metrics(self) -> list[str]:
        """The metrics of the validation."""
        keys = dict.fromkeys(key for _, record in self.validations for key in record)
        return [key for key in keys if key not in _OTHERS and not key.startswith('val_')]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read work dirs.

    Raises:
        UsageError: a folder is none, or nothing was logged in it.
    """
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    for depth in range(2, 5):
        if len(set(names)) == len(names):
            break
        names = ['/'.join(path.parts[-depth:]) for path in paths]
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a work dir, see :func:`read_runs`."""
    if not folder.is_dir():
        raise UsageError(f'{folder} is no folder, expected a work dir of tools/train.py.')
    run = Run(folder, name or folder.name)
    starts = sorted(p.parent.parent for p in folder.glob('*/vis_data/config.py'))
    for start in starts:
        _read_scalars(run, start / 'vis_data/scalars.json')
        about = _read_json(start / 'run.json')
        if about:
            command = about['command']
            run.commands += [command] if command not in run.commands else []
            source = Path(about['config'])
            run.source = source if source.is_file() else run.source
        if tested := _read_json(start / f'{start.name}.json'):
            run.tests = {k: v for k, v in tested.items() if k not in _OTHERS and _is_number(v)}
    if not starts:
        raise UsageError(
            f'{folder} has no */vis_data/config.py, expected a work dir of tools/train.py, such as '
            'work_dirs/FOLDER/NAME.'
        )
    for start in reversed(starts):  # a test has the config of no training
        path = start / 'vis_data/config.py'
        cfg = Config.fromfile(path)
        if run.cfg is None or cfg.get('train_cfg'):
            run.cfg, run.config = cfg, path
        if cfg.get('train_cfg'):
            break
    for log in sorted(folder.glob('*/*.log'), reverse=True):
        if found := _SECTION.search(log.read_text('utf-8', errors='replace')):
            run.environment = found[1].strip('\n')
            break
    return run


def _read_json(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text('utf-8'))
    except (OSError, ValueError):  # not there, or just being written
        return None
    return content if isinstance(content, dict) else None


def _read_scalars(run: Run, path: Path) -> None:
    """Add the records of a file; a resumed training replaces what it has computed again."""
    if not path.is_file():
        return
    iteration = None
    for line in path.read_text('utf-8').splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that is being written
            continue
        record = {key.removeprefix('train/').removeprefix('val/'): record[key] for key in record}
        if 'lr' in record or 'loss' in record:
            record.setdefault('iter', record.get('step'))
            if iteration is None:
                run.records = [r for r in run.records if r['iter'] < record['iter']]
                run.validations = [v for v in run.validations if v[0] < record['iter']]
            iteration = record['iter']
            run.records.append(record)
        elif iteration is not None:  # a validation may count epochs
            run.validations.append((iteration, record))
    run.updated = path.stat().st_mtime


# --- configs -----------------------------------------------------------------------------------


def flatten(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """The values in a config by their dotted keys."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from flatten(part, f'{key}.{name}' if key else str(name))
    elif isinstance(value, (list, tuple)) and _has_mapping(value):
        for i, part in enumerate(value):
            yield from flatten(part, f'{key}.{i}')
    else:
        yield key, list(value) if isinstance(value, tuple) else value


def _has_mapping(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_mapping, value))
    return isinstance(value, Mapping)


def settings(cfg: Config) -> dict[str, Any]:
    """What the Runner reads of a config, without the helper variables beside it."""
    known = {*inspect.signature(Runner.__init__).parameters, 'auto_scale_lr', 'tta_pipeline'}
    known -= {'self', 'cfg', 'work_dir', 'launcher', 'experiment_name'}
    flat = flatten({key: cfg[key] for key in cfg if key in known})
    return {key: value for key, value in flat if not key.endswith('_scope_')}


def base_of(source: Path) -> Config | None:
    """What a config inherits, before its own lines; None if it inherits nothing."""
    bases = Config._get_base_files(str(source))
    bases = [bases] if isinstance(bases, str) else bases
    if not bases:
        return None
    merged: dict = {}
    for base in bases:
        path = Path(base) if Path(base).is_absolute() else source.parent / base
        merged |= Config.fromfile(path).to_dict()
    return Config(merged)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The keys whose values differ between flat configs, with the values as text."""
    keys = dict.fromkeys(key for cfg in configs for key in cfg)
    rows = []
    for key in keys:
        values = [repr(cfg[key]) if key in cfg else MISSING for cfg in configs]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows


def age(seconds: float) -> str:
    """How long ago a time was, as text."""
    passed = max(0.0, time.time() - seconds)
    for unit, length in (('day', 86400), ('hour', 3600), ('minute', 60)):
        if passed >= length:
            number = int(passed // length)
            return f'{number} {unit}{"s" if number > 1 else ""} ago'
    return 'just now'
