"""The goals on a GPU, and whether measured rows reach them."""

from rich import box
from rich.table import Table

PEERS = ('mmdet', 'timm', 'hf', 'official')
DETECTION = (800, 1344)
# Key, words, and whether a value reaches the goal.
GOALS = {
    'time': ("MMDetection's training step takes 1.5 times ours, 800x1344, float16", 1.5, '>='),
    'memory': ("our peak is half of MMDetection's, the same step", 0.5, '<='),
    'never slower': ('no peer takes less time, in any row', 1.0, '>='),
    'roofline': ('our own products take 0.6 of a training step, bfloat16', 0.6, '>='),
}


def judge(setting: dict, rows: dict[str, dict[str, float]]) -> dict[str, dict]:
    """The goals that a row decides: key -> ``value``, ``passed``, and the ``peer`` if there is one.

    Args:
        setting: ``mode``, ``size`` and ``dtype``.
        rows: The numbers of each contender.
    """
    found: dict[str, tuple[float, str | None]] = {}
    training = setting['mode'] == 'train'
    detection = tuple(setting['size']) == DETECTION and setting['dtype'] == 'float16'
    if training and detection and 'mmdet' in rows:
        found['time'] = rows['mmdet']['time_ratio'], 'mmdet'
        found['memory'] = 1 / rows['mmdet']['peak_ratio'], 'mmdet'
    ratios = [(rows[peer]['time_ratio'], peer) for peer in PEERS if peer in rows]
    if ratios:
        found['never slower'] = min(ratios)
    if training and setting['dtype'] == 'bfloat16' and 'of_roofline' in rows.get('ours', {}):
        found['roofline'] = rows['ours']['of_roofline'], None
    return {
        key: dict(value=value, passed=reaches(key, value), peer=peer)
        for key, (value, peer) in found.items()
    }


def reaches(key: str, value: float) -> bool:
    _, target, sign = GOALS[key]
    return value >= target if sign == '>=' else value <= target


def missed(judged: dict[str, dict]) -> str:
    """The goals that a row misses, in a cell: 'never slower 0.97 (timm)'; '' if it decides none."""
    if not judged:
        return ''
    parts = [
        f'{key} {goal["value"]:.2f}' + (f' ({goal["peer"]})' if goal['peer'] else '')
        for key, goal in judged.items()
        if not goal['passed']
    ]
    return ', '.join(parts) or 'reached'


def summary(results: list[dict]) -> Table:
    """Each goal with the worst value of all rows that decide it."""
    made = Table('goal', box=box.MARKDOWN)
    for title in ('target', 'worst', 'rows', 'reached', 'the worst row'):
        made.add_column(title, justify='right')
    for key, (words, target, sign) in GOALS.items():
        decided = [
            (result['goals'][key]['value'], result['title'])
            for result in results
            if key in result.get('goals', {})
        ]
        if not decided:
            made.add_row(words, f'{sign} {target}', '', '0', 'not measured', '')
            continue
        worst, title = (min if sign == '>=' else max)(decided)
        reached = sum(reaches(key, value) for value, _ in decided)
        counts = str(len(decided)), f'{reached} of {len(decided)}'
        made.add_row(words, f'{sign} {target}', f'{worst:.2f}', *counts, title)
    return made
