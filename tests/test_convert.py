"""tools/convert.py: its files load in the other library, and it tells what it has written."""

import subprocess
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from safetensors.torch import load_file, save_file

from benchmarks.speed.peers import import_peer
from pvt_mm import PVT, PVTv2
from pvt_mm.weights import read_checkpoint

from .conftest import classifier_file, randomise
from .scripts import run_script
from .weights.test_files import Planted

ROOT = Path(__file__).parents[1]


def convert(*arguments: str | Path) -> subprocess.CompletedProcess:
    return run_script([ROOT / 'tools/convert.py', *arguments])


def detector() -> torch.nn.Module:
    init_default_scope('mmdet')
    from mmdet.registry import MODELS

    cfg = Config.fromfile(ROOT / 'configs/retinanet/pvt_t_fpn_1x.py')
    cfg.model.backbone.init_cfg = None
    return MODELS.build(cfg.model)


def test_a_classifier_there_and_back(tmp_path):
    state = classifier_file(PVTv2('b0'))
    torch.save(dict(model=state, optimizer=dict(lr=1), epoch=3), tmp_path / 'in.pth')
    result = convert(tmp_path / 'in.pth', tmp_path / 'hf.safetensors', '--to', 'hf')
    assert result.stdout.strip() == (
        f"{tmp_path}/hf.safetensors: PVTv2 arch 'b0' from the authors' names, 194 tensors in the "
        f'names of hf'
    )
    assert 'pvt_v2.encoder.layers.0.blocks.0.attention.key.bias' in load_file(
        tmp_path / 'hf.safetensors'
    )
    assert convert(tmp_path / 'hf.safetensors', tmp_path / 'back.pth', '--to', 'pvt_mm').stdout
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
def test_files_of_timm_itself(ending, tmp_path):
    """Those that it saves load here, and those that we write there."""
    try:
        timm = import_peer('timm')
    except ModuleNotFoundError:
        pytest.skip('timm is not installed')

    peer = randomise(timm.create_model('pvt_v2_b0')).eval()
    saved, written = tmp_path / f'timm{ending}', tmp_path / f'written{ending}'
    save = torch.save if ending == '.pth' else save_file
    save(peer.state_dict(), saved)
    model = PVTv2('b0', init_cfg=dict(type='Pretrained', checkpoint=str(saved)))
    model.init_weights()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = peer.forward_intermediates(x, intermediates_only=True)
        torch.testing.assert_close(model.eval()(x), tuple(expected), rtol=1e-4, atol=1e-5)
    result = convert(saved, tmp_path / 'ours.pth', '--to', 'pvt_mm')
    assert "PVTv2 arch 'b0' from timm's PVTv2, 178 tensors in the names of pvt_mm" in result.stdout
    assert not convert(tmp_path / 'ours.pth', written, '--to', 'timm').returncode
    again = timm.create_model('pvt_v2_b0', checkpoint_path=str(written)).state_dict()
    assert all(torch.equal(again[k], v) for k, v in peer.state_dict().items())


def test_a_classifier_to_mmpretrain_and_back(tmp_path):
    """The head goes with it, unless --backbone is given."""
    state = classifier_file(PVT('tiny'))
    torch.save(state, tmp_path / 'in.pth')
    assert not convert(tmp_path / 'in.pth', tmp_path / 'mm.pth', '--to', 'mmpretrain').returncode
    written = torch.load(tmp_path / 'mm.pth', weights_only=True)
    assert {'backbone.cls_token', 'backbone.norm.weight', 'head.fc.bias'} <= written.keys()
    torch.save(dict(state_dict=written, meta={}), tmp_path / 'epoch_300.pth')
    result = convert(tmp_path / 'epoch_300.pth', tmp_path / 'back.pth', '--to', 'pvt_mm')
    assert "PVT arch 'tiny' from the authors' names, 161 tensors in the names" in result.stdout
    back = torch.load(tmp_path / 'back.pth', weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    convert(tmp_path / 'epoch_300.pth', tmp_path / 'b.pth', '--to', 'pvt_mm', '--backbone')
    backbone = torch.load(tmp_path / 'b.pth', weights_only=True)
    assert state.keys() - backbone.keys() == {'head.weight', 'head.bias'}


def test_a_whole_detector(tmp_path):
    """Ours as MMDetection's: it loads strictly into MMDetection's own detector, and back."""
    from mmdet.registry import MODELS

    model = randomise(detector())
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'epoch_12.pth')
    result = convert(tmp_path / 'epoch_12.pth', tmp_path / 'theirs.pth', '--to', 'mmdet')
    assert not result.returncode, result.stdout
    cfg = Config.fromfile(
        ROOT / 'configs/retinanet/pvt_t_fpn_1x.py', import_custom_modules=False
    ).model
    cfg.backbone = dict(
        type='PyramidVisionTransformer', num_layers=[2, 2, 2, 2], num_heads=[1, 2, 5, 8]
    )
    peer = MODELS.build(cfg)
    peer.load_state_dict(torch.load(tmp_path / 'theirs.pth', weights_only=True), strict=True)
    torch.save(dict(state_dict=peer.state_dict()), tmp_path / 'their_epoch.pth')
    twin = detector()
    twin.load_state_dict(peer.state_dict(), strict=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in twin.state_dict().items())
    result = convert(tmp_path / 'their_epoch.pth', tmp_path / 'b.pth', '--to=pvt_mm', '--backbone')
    assert 'without 36 tensors around it' in result.stdout
    backbone = torch.load(tmp_path / 'b.pth', weights_only=True)
    assert backbone.keys() == twin.backbone.state_dict().keys()


@pytest.mark.parametrize(
    ('name', 'to', 'message'),
    [
        ('exists.pth', 'timm', 'exists.pth exists: name a new file'),
        ('out.bin', 'timm', 'out.bin: expected a name that ends in .pth or .safetensors'),
        ('out.pth', 'timm', 'timm has no PVT v1'),
        ('out.pth', 'hf', '1 tensors are not those of a PVT, first block1.0.lora_A: merge'),
    ],
)
def test_mistakes(tmp_path, name, to, message):
    adapter = {'block1.0.lora_A': torch.zeros(1)} if to == 'hf' else {}
    torch.save(PVT('tiny').state_dict() | adapter, tmp_path / 'in.pth')
    (tmp_path / 'exists.pth').write_text('mine')
    result = convert(tmp_path / 'in.pth', tmp_path / name, '--to', to)
    assert result.returncode == 1
    assert message in result.stdout and 'Traceback' not in result.stdout
    assert (tmp_path / 'exists.pth').read_text() == 'mine'


@pytest.mark.parametrize(
    ('to', 'prefix', 'suffix'),
    [
        ('pvt_mm', '', '.pth'),
        ('mmdet', 'backbone.', '.pth'),
        ('mmdet', 'backbone.', '.safetensors'),
        ('hf', '', '.safetensors'),
    ],
)
def test_the_grids_of_position_embeddings_are_kept(tmp_path, to, prefix, suffix):
    """64 x 256 pixels have as many tokens as 128 x 128."""
    model = randomise(PVT('tiny', pretrain_img_size=(64, 256)))
    outer = torch.nn.ModuleDict(dict(backbone=model)) if prefix else model
    torch.save(dict(state_dict=outer.state_dict()), tmp_path / 'in.pth')
    result = convert(tmp_path / 'in.pth', tmp_path / f'out{suffix}', '--to', to)
    assert not result.returncode, result.stdout
    twins = [PVT('tiny', pretrain_img_size=128) for _ in range(2)]
    twins[0].load_state_dict(model.state_dict())
    twins[1].load_state_dict(read_checkpoint(tmp_path / f'out{suffix}'))
    expected = twins[0].state_dict()
    assert not torch.equal(expected['pos_embed1'], model.pos_embed1)
    assert all(torch.equal(v, expected[k]) for k, v in twins[1].state_dict().items())


def test_the_content_of_a_file_is_not_run(tmp_path):
    torch.save(dict(state_dict={}, meta=Planted(tmp_path / 'planted')), tmp_path / 'in.pth')
    result = convert(tmp_path / 'in.pth', tmp_path / 'out.pth', '--to', 'pvt_mm')
    assert result.returncode == 1
    assert 'holds more than weights (io.open)' in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in.pth']


def test_no_pvt(tmp_path):
    save_file({'conv1.weight': torch.zeros(1)}, tmp_path / 'in.safetensors')
    result = convert(tmp_path / 'in.safetensors', tmp_path / 'out.pth', '--to', 'timm')
    assert 'no PVT: its first keys are conv1.weight' in result.stdout
    assert not (tmp_path / 'out.pth').exists()


def test_one_of_several_backbones(tmp_path):
    """As in SoftTeacher and in distillation."""
    student, teacher = (randomise(PVT('tiny')).state_dict() for _ in range(2))
    teacher = {key: value + 1 for key, value in teacher.items()}
    state = {f'student.backbone.{key}': value for key, value in student.items()}
    state |= {f'teacher.backbone.{key}': value for key, value in teacher.items()}
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'in.pth')
    arguments = [tmp_path / 'in.pth', tmp_path / 'out.pth', '--to', 'pvt_mm', '--backbone']
    refused = convert(*arguments)
    assert refused.returncode == 1
    assert (
        "several PVT backbones, under 'student.backbone.', 'teacher.backbone.': " in refused.stdout
    )
    assert '--prefix of tools/convert.py' in refused.stdout
    wrong = convert(*arguments, '--prefix', 'tutor')
    assert "There is no PVT under 'tutor.', but 'student.backbone.'" in wrong.stdout
    assert convert(*arguments, '--prefix', 'teacher.backbone').returncode == 0
    written = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert written.keys() == teacher.keys()
    assert all(torch.equal(written[key], teacher[key]) for key in teacher)
