"""The backbones on a device without kernels for it: nothing is made or computed on the CPU."""

import json
from collections import defaultdict

import pytest
import torch
from torch.utils import backend_registration

from .conftest import ROOT, all_archs
from .scripts import run_script

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, '_setup_privateuseone_for_python_backend'),
    reason=f'torch {torch.__version__} registers no device without kernels',
)


@pytest.fixture(scope='module')
def trained():
    """What tests/fake_device.py tells of each arch; the device must not be seen by other tests."""
    done = run_script(['-m', 'tests.fake_device'], cwd=ROOT)
    assert done.returncode == 0, done.stdout
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        if not line.startswith('{'):
            continue
        case = json.loads(line)
        found[case['arch']].append(case)
    return found


@all_archs
def test_everything_is_on_the_device_of_the_images(cls, arch, trained):
    cases = trained[arch]
    assert len(cases) == 3
    for case in cases:
        assert case['wrong'] == []


@all_archs
def test_maps_and_gradients_are_those_of_the_cpu(cls, arch, trained):
    for case in trained[arch]:
        with torch.device('meta'):
            model = cls(arch, depths=(1, 1, 1, 1), frozen_stages=case['frozen'])
            maps = model(torch.empty(2, 3, *case['size']))
        assert case['maps'] == [[list(y.shape), list(y.stride())] for y in maps]
        assert case['gradients'] == {
            key: [list(parameter.shape), case['dtype']]
            for key, parameter in model.named_parameters()
            if parameter.requires_grad
        }
