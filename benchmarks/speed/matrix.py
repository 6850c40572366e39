"""The settings that are measured on a GPU, most important first."""

from collections.abc import Iterator

MODELS = ('pvt_small', 'pvt_v2_b2', 'pvt_large', 'pvt_v2_b5', 'pvt_v2_b2_li')
# Images and (height, width): of detection, of classification, of segmentation.
IMAGES = ((2, (800, 1344)), (64, (224, 224)), (16, (512, 512)))
GOALS = (('train', 'float16'), ('train', 'bfloat16'), ('inference', 'float16'))


def rows(
    images: tuple[tuple[int, tuple[int, int]], ...] = IMAGES, compiled: bool = False
) -> Iterator[dict]:
    """Model, mode, batch, size and dtype of each setting.

    The rows of the goals come first, then the other sizes, the other dtype in inference, and some
    in float32. In eager mode the rows of a model follow each other, since a process then builds it
    once. Compiling takes longer than anything else, so the smaller models come first there.
    """
    for image in images:
        if compiled:
            order = [(model, *kind) for kind in GOALS for model in MODELS]
        else:
            order = [(model, *kind) for model in MODELS for kind in GOALS]
        for model, mode, dtype in order:
            yield row(model, mode, dtype, image)
    for image in images:
        for model in MODELS:
            yield row(model, 'inference', 'bfloat16', image)
    for model in MODELS[:2]:
        for mode in ('train', 'inference'):
            yield row(model, mode, 'float32', images[0])


def row(model: str, mode: str, dtype: str, image: tuple[int, tuple[int, int]]) -> dict:
    return dict(model=model, mode=mode, batch=image[0], size=image[1], dtype=dtype)
