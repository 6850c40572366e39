"""A plugin of pytest that writes every result at once: what a crash or a time limit cuts off stays.

``GPU_TESTS_JSON`` names the file, a list of tests: ``name``, ``outcome`` (``running`` until it is
known), ``seconds``, ``message`` and what the test has ``measured`` with ``record_property``.
"""

import os
from pathlib import Path

from benchmarks.files import write_json

_tests: dict[str, dict] = {}


def _write() -> None:
    write_json(Path(os.environ['GPU_TESTS_JSON']), list(_tests.values()))


def pytest_runtest_logstart(nodeid: str) -> None:
    name = nodeid.rpartition('/')[2]
    _tests[nodeid] = dict(name=name, outcome='running', seconds=0.0, message='', measured={})
    _write()


def pytest_runtest_logreport(report) -> None:
    test = _tests[report.nodeid]
    test['seconds'] = round(test['seconds'] + report.duration, 2)
    if report.when == 'call' or report.outcome != 'passed':
        test['outcome'] = report.outcome
        test['measured'] = dict(report.user_properties)
        if report.skipped and isinstance(report.longrepr, tuple):
            test['message'] = report.longrepr[2]
        elif report.failed:
            test['message'] = report.longreprtext[-2000:]
    _write()


def pytest_collectreport(report) -> None:
    if report.failed:
        name, message = report.nodeid, report.longreprtext[-2000:]
        _tests[name] = dict(name=name, outcome='failed', seconds=0.0, message=message, measured={})
        _write()
