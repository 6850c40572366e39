"""Loading while training: what cannot be read is replaced and counted, up to a limit."""

import copy
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.dataset import ConcatDataset
from mmseg.datasets import BaseSegDataset
from PIL import Image

from pvt_mm.data.loading import DataError, replace_unreadable, watch
from pvt_mm.engine import ToolRunner, UsageError, run
from pvt_mm.engine.hooks import UnreadableImagesHook

from ..engine.toys import toy_runner
from .conftest import CLASSES, SIZE, annotations, write_coco, write_images


def detection(root: Path, test_mode: bool = False, images: int = 6) -> CocoDataset:
    path = write_coco(root, content=annotations(images))
    return CocoDataset(
        ann_file=str(path),
        data_prefix=dict(img=f'{root}/train2017'),
        metainfo=dict(classes=CLASSES),
        test_mode=test_mode,
        pipeline=[
            dict(type='mmdet.LoadImageFromFile'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True),
            dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape')),
        ],
    )


def loader(dataset, workers: int = 0, share: float | None = 0.01):
    """As a runner builds it; for a test set with ``share=None``."""
    batches = ToolRunner.build_dataloader(
        dict(
            batch_size=2,
            num_workers=workers,
            dataset=dataset,
            collate_fn=dict(type='pseudo_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False),
        )
    )
    if share is not None:
        replace_unreadable(batches.dataset, share)
    return batches


def ids(batches) -> list[int]:
    return [sample.img_id for batch in batches for sample in batch['data_samples']]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('spoil', ['truncated', 'missing', 'empty'])
def test_another_image_takes_the_place(spoil, workers, tmp_path):
    dataset = detection(tmp_path)
    path = tmp_path / 'train2017/003.jpg'
    if spoil == 'missing':
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 300 if spoil == 'truncated' else 0])
    batches = loader(dataset, workers, 0.2)
    dataset = batches.dataset
    found = ids(batches)
    assert found[:2] + found[3:] == [1, 2, 4, 5, 6]
    assert found[2] in {1, 2, 4, 5, 6}
    assert dataset.unreadable.flags.nonzero().flatten().tolist() == [2]
    assert len(ids(batches)) == 6  # the second epoch counts it once
    assert (dataset.unreadable.count, dataset.unreadable.limit) == (1, 1)


@pytest.mark.parametrize('workers', [0, 2])
def test_too_many_stop_training_with_one_sentence(workers, tmp_path, capsys):
    dataset = detection(tmp_path)
    for n in (2, 5, 6):
        (tmp_path / f'train2017/{n:03}.jpg').write_bytes(b'')
    with pytest.raises(DataError) as error:
        ids(loader(dataset, workers, 0.34))
    message = str(error.value)
    assert message.startswith(
        '3 of 6 training images could not be loaded, more than '
        f'train_dataloader.max_unreadable=0.34 allows; the last: {tmp_path}/train2017/00'
    )
    assert message.endswith('tools/check_data.py CONFIG --full lists them.')
    assert '\n' not in message

    def main():
        raise error.value

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == message
    assert not issubclass(DataError, UsageError)


@pytest.mark.parametrize('test_mode', [False, True])  # MMSegmentation leaves it False
def test_a_test_set_is_never_shortened(test_mode, tmp_path):
    dataset = detection(tmp_path, test_mode)
    (tmp_path / 'train2017/002.jpg').unlink()
    with pytest.raises(DataError) as error:
        ids(loader(dataset, share=None))
    assert str(error.value) == (
        f'{tmp_path}/train2017/002.jpg (No such file or directory) cannot be loaded: remove or '
        'replace it.'
    )


def test_a_sentence_is_one_line():
    """Also for a file name with a line break, and from the traceback of a worker process."""
    error = DataError(
        'Traceback:\n  x\npvt_mm.data.loading.DataError: a\nb.jpg cannot be loaded.\n'
    )
    assert str(error) == 'a b.jpg cannot be loaded.'


def test_datasets_inside_others(tmp_path):
    parts = [detection(tmp_path / str(i)) for i in range(2) if (tmp_path / str(i)).mkdir() is None]
    (tmp_path / '1/train2017/001.jpg').unlink()
    batches = loader(ConcatDataset(parts))
    parts = batches.dataset.datasets
    assert len(ids(batches)) == 12
    assert [part.unreadable.count for part in parts] == [0, 1]
    steps = parts[0].pipeline.transforms
    watch(batches.dataset)  # once is enough
    assert parts[0].pipeline.transforms == steps
    assert repr(steps[0]).startswith('LoadImageFromFile(ignore_empty=False')
    assert steps[0].color_type == pickle.loads(pickle.dumps(copy.copy(steps[0]))).color_type


def test_the_log_names_each_once(tmp_path, caplog):
    dataset = detection(tmp_path)
    (tmp_path / 'train2017/004.jpg').write_bytes(b'<html>')
    batches = loader(dataset)
    ids(batches)
    runner = SimpleNamespace(train_dataloader=batches, logger=logging.getLogger('unreadable'))
    hook = UnreadableImagesHook()
    for _ in range(3):
        hook.after_train_iter(runner, 0)
    assert [record.getMessage() for record in caplog.records] == [
        f'{tmp_path}/train2017/004.jpg is an HTML page, not an image; another image takes its '
        'place: 1 so far, at most 1 of 6.'
    ]


# --- rotated photographs ------------------------------------------------------------------------


def write_turned(path: Path, rotation: int) -> np.ndarray:
    """A grey ramp with an EXIF rotation; returns it as stored."""
    ramp = np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = rotation
    Image.fromarray(ramp).convert('RGB').save(path, exif=exif, quality=100)
    return ramp


@pytest.mark.parametrize('test_mode', [False, True])
@pytest.mark.parametrize('annotated', ['stored', 'shown'])
def test_a_rotated_photograph_is_loaded_as_annotated(annotated, test_mode, tmp_path):
    dataset = detection(tmp_path, test_mode)
    stored = write_turned(tmp_path / 'train2017/001.jpg', 6)
    if annotated == 'shown':
        content = annotations(6)
        content['images'][0].update(width=SIZE[1], height=SIZE[0])
        write_coco(tmp_path, content=content)
        dataset = detection_of(tmp_path, content, test_mode)
        write_turned(tmp_path / 'train2017/001.jpg', 6)
    [first, *_] = loader(dataset, share=None if test_mode else 0.01)
    image = first['inputs'][0].numpy()[0]
    expected = stored if annotated == 'stored' else np.rot90(stored, -1)
    np.testing.assert_allclose(image, expected, atol=3)
    assert first['data_samples'][0].ori_shape == expected.shape


def detection_of(root: Path, content: dict, test_mode: bool) -> CocoDataset:
    dataset = detection(root, test_mode)
    return CocoDataset(
        ann_file=str(write_coco(root, content=content)),
        data_prefix=dict(img=f'{root}/train2017'),
        metainfo=dict(classes=CLASSES),
        test_mode=test_mode,
        pipeline=dataset.pipeline.transforms,
    )


# --- label maps ---------------------------------------------------------------------------------


def segmentation(root: Path, test_mode: bool = False) -> BaseSegDataset:
    write_images(root / 'images', [f'{n}.jpg' for n in range(4)])
    (root / 'labels').mkdir()
    for n in range(4):
        labels = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1]) % 4
        cv2.imwrite(f'{root}/labels/{n}.png', np.where(labels == 3, 255, labels).astype(np.uint8))
    return BaseSegDataset(
        data_root=str(root),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=CLASSES),
        test_mode=test_mode,
        pipeline=[
            dict(type='mmseg.LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations'),
            dict(type='mmseg.PackSegInputs', meta_keys=('img_path', 'ori_shape')),
        ],
    )


def names(batches) -> list[str]:
    return [Path(s.img_path).stem for batch in batches for s in batch['data_samples']]


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda m: m[:20], 'labels/2.png is 20x40, expected 30x40'),
        (lambda m: np.where(m == 1, 199, m), 'labels/2.png has [199], expected less than 3'),
        (lambda m: np.where(m == 1, 3, m), 'labels/2.png has [3], expected less than 3'),
        (lambda m: np.stack([m] * 3, -1), 'labels/2.png is 30x40x3, expected 30x40'),
        (None, 'No such file or directory'),
    ],
)
def test_label_maps_that_do_not_fit(change, reason, tmp_path):
    dataset = segmentation(tmp_path)
    path = tmp_path / 'labels/2.png'
    if change:
        cv2.imwrite(str(path), change(cv2.imread(str(path), -1)).astype(np.uint8))
    else:
        path.unlink()
    batches = loader(dataset)
    dataset = batches.dataset
    found = names(batches)
    assert [*found[:2], found[3]] == ['0', '1', '3']
    assert found[2] != '2'
    (tmp_path / 'images/0.jpg').unlink()
    with pytest.raises(DataError, match='2 of 4 training images'):
        names(batches)
    dataset.unreadable.flags[:] = True
    with pytest.raises(DataError) as error:
        dataset.pipeline(dataset.get_data_info(2))
    assert reason in str(error.value)


@pytest.mark.parametrize('test_mode', [False, True])
def test_sound_label_maps_and_rotated_photographs(test_mode, tmp_path):
    dataset = segmentation(tmp_path, test_mode)
    stored = write_turned(tmp_path / 'images/1.jpg', 6)
    batches = list(loader(dataset, share=None if test_mode else 0.01))
    assert names(batches) == ['0', '1', '2', '3']
    np.testing.assert_allclose(batches[0]['inputs'][1].numpy()[0], stored, atol=3)
    labels = batches[0]['data_samples'][1].gt_sem_seg.data.numpy()[0]
    assert labels.shape == stored.shape
    assert set(np.unique(labels)) == {0, 1, 2, 255}


def test_other_datasets_are_left_alone():
    data = [dict(x=1), dict(x=2)]
    batches = ToolRunner.build_dataloader(
        dict(batch_size=1, dataset=data, sampler=dict(type='DefaultSampler', shuffle=False))
    )
    assert batches.dataset == data
    assert ToolRunner.build_dataloader(batches) is batches


def test_a_runner_replaces_in_training_only(tmp_path):
    """Through the loop, and with the limit of the config."""
    runner = toy_runner(tmp_path)
    config = dict(runner._train_dataloader, dataset=detection(tmp_path), max_unreadable=0.5)
    config['collate_fn'] = dict(type='pseudo_collate')
    runner._train_dataloader = config
    loop = runner.build_train_loop(dict(by_epoch=True, max_epochs=1))
    assert loop.dataloader.dataset.unreadable.limit == 3
    steps = loop.dataloader.dataset.pipeline.transforms
    unreadable = loop.dataloader.dataset.unreadable
    assert all(step.unreadable is unreadable for step in steps[:2])
    assert runner.build_dataloader(loop.dataloader) is loop.dataloader
