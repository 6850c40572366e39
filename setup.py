"""Package pvt_mm. Its configs and tools are installed as pvt_mm/.mim, where mim expects them."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'pvt_mm/version.py').read_text())[1]
MIM_FILES = ('configs', 'tools', 'model-index.yml')


class BuildPyWithMim(build_py):
    """Adds .mim: copies in a build, links in an editable checkout."""

    def run(self) -> None:
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / 'pvt_mm'
        mim = package / '.mim'
        # Written again: a build folder keeps files that have been deleted or renamed since. Only
        # .mim is removed: with `--build-lib .` its parent holds the sources.
        shutil.rmtree(mim, ignore_errors=True)
        super().run()
        mim.mkdir(parents=True)
        for name in MIM_FILES:
            if self.editable_mode:
                (mim / name).symlink_to(Path('../..') / name)
            elif (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns('__pycache__', '*.py[co]')
                shutil.copytree(ROOT / name, mim / name, ignore=ignore)
            else:
                shutil.copy2(ROOT / name, mim / name)


setup(
    # mim derives the folder of a package from the first of its files: this name must sort after
    # 'pvt_mm/', and there must be no console script, which would sort before it.
    name='pvt-mmlab',
    version=VERSION,
    description='Pyramid Vision Transformer v1, v2 for MMDetection, MMSegmentation, MMPretrain',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='pvt_mm contributors',
    license='Apache-2.0',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    packages=find_packages(include=['pvt_mm', 'pvt_mm.*']),
    package_data={'': ['*.html', 'static/*']},
    cmdclass={'build_py': BuildPyWithMim},
    python_requires='>=3.10',
    # None, so that installing this package never replaces an installed torch, mmcv, mmdet or mmseg.
    install_requires=[],
    # Two alternatives for an empty environment. Neither has mmcv: pip would build it without its
    # operators (see dev/setup_venv.sh).
    extras_require={
        'onedl': [
            'torch>=2.1',
            'onedl-mmengine>=0.10.12',
            'onedl-mmdetection>=3.5.1',
            'onedl-mmsegmentation>=1.4.2',
            'faster-coco-eval>=1.8',
        ],
        'openmmlab': [
            'torch>=2.1',
            'mmengine>=0.10.4,<1',
            'mmdet>=3.3.0,<3.4',
            'mmsegmentation>=1.2.2,<1.3',
            'ftfy',
            'regex',
            'faster-coco-eval>=1.8',
            'numpy<2',
            'setuptools<81',
        ],
        # In addition, for classification. mmpretrain does not say that it needs torchvision.
        'onedl-classification': ['onedl-mmpretrain>=1.3.6', 'torchvision'],
        'openmmlab-classification': ['mmpretrain>=1.2.0,<1.3', 'torchvision'],
        'draw': ['supervision>=0.25'],
        'app': ['starlette>=0.36', 'uvicorn>=0.27'],
        'export': ['onnx>=1.16', 'onnxruntime>=1.18'],
        'test': ['pytest>=8', 'pytest-cov>=6', 'pytest-xdist>=3', 'safetensors'],
    },
    zip_safe=False,
)
