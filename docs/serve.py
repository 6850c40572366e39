"""Use a file of tools/export.py without PyTorch: python docs/serve.py model.onnx photo.jpg

It needs onnxruntime, numpy and OpenCV, and Pillow for classifiers.
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime


def resize(image, about):
    """The steps of the config's test pipeline, for an image (H, W, 3), uint8, BGR."""
    for step in about['resize']:
        h, w = image.shape[:2]
        size = step.get('scale') or step.get('crop_size') or step.get('size_divisor')
        if step['type'] == 'CenterCrop':
            top, left = round((h - size) / 2), round((w - size) / 2)
            image = image[top : top + size, left : left + size]
            continue
        if step['type'] == 'ResizeToMultiple':
            w, h = -(-w // size) * size, -(-h // size) * size
        elif step['type'] == 'ResizeEdge':
            w, h = (size, size * h // w) if w < h else (size * w // h, size)
        elif step.get('scale_factor'):
            factors = np.broadcast_to(step['scale_factor'], 2)
            w, h = int(w * factors[0] + 0.5), int(h * factors[1] + 0.5)
        elif step.get('keep_ratio'):
            factor = min(max(size) / max(h, w), min(size) / min(h, w))
            w, h = int(w * factor + 0.5), int(h * factor + 0.5)
        else:
            w, h = size
        if step.get('backend') == 'pillow':
            from PIL import Image

            how = Image.Resampling[step['interpolation'].upper()]
            image = np.array(Image.fromarray(image).resize((w, h), how))
        else:
            image = cv2.resize(image, (w, h))
    return image


def as_input(image, about):
    """The image as the file's input, a batch of one."""
    about = about['input']
    x = image[..., ::-1] if about['channels'] == 'RGB' else image
    if about['normalize']:
        x = (x - np.float32(about['mean'])) / np.float32(about['std'])
    x = x.transpose(2, 0, 1) if about['layout'] == 'NCHW' else x
    return np.ascontiguousarray(x[None])


def predict(session, about, image):
    """Boxes, masks, a label map or probabilities in pixels of the image, (H, W, 3), uint8, BGR."""
    small = resize(image, about)
    (h, w), (height, width) = small.shape[:2], image.shape[:2]
    values = session.run(None, {'image': as_input(small, about)})
    found = {out.name: value[0] for out, value in zip(session.get_outputs(), values, strict=True)}
    if 'logits' in found:  # at a quarter of the size, with padding
        pad = about['input']['pad_inside']
        padded = -(-w // pad) * pad, -(-h // pad) * pad
        logits = cv2.resize(found['logits'].transpose(1, 2, 0), padded)[:h, :w]
        return dict(label_map=cv2.resize(logits, (width, height)).argmax(2))
    if 'boxes' not in found:
        return found
    found = {name: value[found['scores'] > 0] for name, value in found.items()}
    found['boxes'] *= np.float32([width / w, height / h] * 2)
    if 'masks' in found:
        pairs = zip(found['masks'], found['boxes'], strict=True)
        masks = [paste(mask, box, (width, height)) for mask, box in pairs]
        found['masks'] = [mask >= about['settings']['mask_threshold'] for mask in masks]
    return found


def paste(mask, box, size):
    """A mask (28, 28) of a box in an image of ``size``, (width, height)."""
    x, y, right, bottom = box
    sx, sy = mask.shape[1] / max(right - x, 1e-3), mask.shape[0] / max(bottom - y, 1e-3)
    matrix = np.array([[sx, 0, (0.5 - x) * sx - 0.5], [0, sy, (0.5 - y) * sy - 0.5]])
    return cv2.warpAffine(mask, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def main():
    session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])
    texts = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(text) for key, text in texts.items()}
    found = predict(session, about, cv2.imread(sys.argv[2]))
    if 'boxes' in found:
        for box, score, label in zip(found['boxes'], found['scores'], found['labels'], strict=True):
            if score >= 0.3:
                print(about['classes'][label], f'{score:.3f}', *box.round(1))
    elif 'label_map' in found:
        labels, counts = np.unique(found['label_map'], return_counts=True)
        for label, count in zip(labels, counts, strict=True):
            print(about['classes'][label], f'{count / found["label_map"].size:.1%}')
    else:
        for label in np.argsort(-found['scores'])[:5]:
            print(about['classes'][label], f'{found["scores"][label]:.3f}')


if __name__ == '__main__':
    main()
