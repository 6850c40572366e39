"""The tables in the documents agree with the metafiles."""

import shutil

import pytest
import yaml

from .conftest import ROOT, import_tool


@pytest.fixture
def model_zoo(tmp_path, monkeypatch):
    """The tool, on a copy of the documents and metafiles."""
    tool = import_tool('dev/model_zoo')
    for path in (ROOT / 'README.md', *ROOT.glob('docs/*.md'), *ROOT.glob('configs/*/metafile.yml')):
        copied = tmp_path / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    monkeypatch.setattr('sys.argv', ['model_zoo.py', '--check'])
    return tool


def test_the_documents_agree_with_the_metafiles(model_zoo, capsys):
    model_zoo.main()
    assert capsys.readouterr().out == ''


def test_every_model_is_in_a_table(model_zoo):
    assert model_zoo.documents() == ['README.md', 'docs/configs.md']
    text = model_zoo.render('docs/configs.md')
    for path in ROOT.glob('configs/*/metafile.yml'):
        for model in model_zoo.models(path.parent.name):
            link = model.get('Weights', f'../{model["Config"]}')
            assert text.count(f']({link})') == 1, link


def test_a_changed_number_is_noticed_and_written(model_zoo, capsys, monkeypatch):
    path = model_zoo.ROOT / 'configs/maskrcnn/metafile.yml'
    path.write_text(path.read_text('utf-8').replace('box AP: 40.4', 'box AP: 40.5'), 'utf-8')
    with pytest.raises(SystemExit, match='1'):
        model_zoo.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f'{n}: differs from the metafiles' for n in model_zoo.documents()]
    before = (ROOT / 'README.md').read_text('utf-8')
    monkeypatch.setattr('sys.argv', ['model_zoo.py'])
    model_zoo.main()
    after = (model_zoo.ROOT / 'README.md').read_text('utf-8')
    (changed,) = set(after.splitlines()) - set(before.splitlines())
    assert changed.startswith('| `pvt_s` | PVT-Small | 40.4 |  | 40.5 / 37.8 |')
    monkeypatch.setattr('sys.argv', ['model_zoo.py', '--check'])
    model_zoo.main()


def test_a_backbone_needs_no_published_numbers(model_zoo):
    """A new size has a config and counted numbers, but neither weights nor results yet."""
    path = model_zoo.ROOT / 'configs/backbones/metafile.yml'
    content = yaml.safe_load(path.read_text('utf-8'))
    counted = {'Parameters (M)': 1.5, 'Parameters of the classifier (M)': 1.75, 'FLOPs (G)': 0.25}
    entry = dict(Name='pvt_wide', Config='configs/backbones/pvt_wide.py')
    entry |= {'In Collection': 'PVT', 'Metadata': dict(Backbone='PVT-Wide', **counted)}
    content['Models'].append(entry)
    path.write_text(yaml.safe_dump(content), 'utf-8')
    link = '[pvt_wide](../configs/backbones/pvt_wide.py)'
    row = f'| {link} | PVT-Wide | 1.50 | 1.75 | – | 0.25 | – | – |'
    assert row in model_zoo.render('docs/configs.md').splitlines()
