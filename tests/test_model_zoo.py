"""The tables in the documents are what the metafiles say."""

import shutil

import pytest

from .conftest import ROOT, import_tool


@pytest.fixture
def model_zoo(tmp_path, monkeypatch):
    """The tool, on a copy of what it reads and writes."""
    tool = import_tool('model_zoo')
    for name in ('README.md', 'docs/configs.md'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for path in ROOT.glob('configs/*/metafile.yml'):
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True)
        shutil.copy(path, copied)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr('sys.argv', ['model_zoo.py', '--check'])
    return tool


def test_the_documents_agree_with_the_metafiles(model_zoo, capsys):
    model_zoo.main()
    assert capsys.readouterr().out == ''


def test_every_model_is_in_a_table(model_zoo):
    text = model_zoo.render('docs/configs.md')
    for path in ROOT.glob('configs/*/metafile.yml'):
        for model in model_zoo.models(path.parent.name):
            link = model['Weights'] if path.parent.name == 'backbones' else f'../{model["Config"]}'
            assert text.count(f']({link})') == 1, link


def test_a_changed_number_is_noticed_and_written(model_zoo, capsys, monkeypatch):
    path = model_zoo.ROOT / 'configs/maskrcnn/metafile.yml'
    path.write_text(path.read_text('utf-8').replace('box AP: 40.4', 'box AP: 40.5'), 'utf-8')
    with pytest.raises(SystemExit, match='1'):
        model_zoo.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f'{n}: differs from the metafiles' for n in model_zoo.DOCUMENTS]
    before = (ROOT / 'README.md').read_text('utf-8')
    monkeypatch.setattr('sys.argv', ['model_zoo.py'])
    model_zoo.main()
    after = (model_zoo.ROOT / 'README.md').read_text('utf-8')
    (changed,) = set(after.splitlines()) - set(before.splitlines())
    assert changed.startswith('| `pvt_s` | PVT-Small | 40.4 |  | 40.5 / 37.8 |')
    monkeypatch.setattr('sys.argv', ['model_zoo.py', '--check'])
    model_zoo.main()
