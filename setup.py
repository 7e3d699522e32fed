"""Package metadata. Tool settings live in pyproject.toml."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent


def version() -> str:
  """Reads the version without importing the package."""
  text = (ROOT / 'pf_jax' / '__init__.py').read_text(encoding='utf-8')
  match = re.search(r"^__version__ = '([^']+)'$", text, re.MULTILINE)
  if match is None:
    raise RuntimeError('pf_jax/__init__.py defines no __version__.')
  return match.group(1)


def readme() -> str:
  """The README, or '' in a source tree without one."""
  path = ROOT / 'README.md'
  return path.read_text(encoding='utf-8') if path.exists() else ''


# What sampling, decoding and looking at results need.
REQUIRED = [
    'absl-py>=2.1',
    'av>=17',
    'einops>=0.8',
    'flax>=0.12.5,<0.14',
    'ftfy>=6.2',
    'jax>=0.10.2,<0.13',
    'matplotlib>=3.9',
    'ml-collections>=1.0',
    'ml_dtypes>=0.5',
    'numpy>=2.0',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.12',
    'pillow>=10',
    'safetensors>=0.5',
    'tensorstore>=0.1.71',
    'tokenizers>=0.20',
    'tqdm>=4.66',
]

TRAIN = [
    'grain>=0.2.15',
    'scikit-learn>=1.5',
    'tensorboardX>=2.6.2',
]

# Downloads of released weights; directories on disk do without.
HUB = ['huggingface_hub>=0.30']

DEV = [
    'hypothesis>=6.100',
    'ipykernel>=6.29',
    'jupytext>=1.16',
    'mypy>=1.13',
    'nbclient>=0.10',
    'nbformat>=5.10',
    'pytest>=8.3',
    'pytest-timeout>=2.3',
    'pytest-xdist>=3.6',
    'ruff>=0.8',
]

# Oracles of `make test-parity` only; the package never imports them. What they say does not depend
# on the interpreter, so one is enough. Where pip offers torch with CUDA's gigabytes only, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. Without accelerate, diffusers refuses to
# load Wan's transformer from files: parts of it stay float32 in any precision.
PARITY = [f"{requirement}; python_version < '3.12'" for requirement in (
    'torch==2.13.0',
    'accelerate>=1',
    'diffusers>=0.42',
    'sentencepiece>=0.2',
    'transformers>=5',
)]

setuptools.setup(
    name='pf-jax',
    version=version(),
    description='Minutes-long video generation with a bounded key/value cache, in JAX.',
    long_description=readme(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['pf_jax', 'pf_jax.*']),
    package_data={'pf_jax': ['py.typed', 'kernels/tuned.json', 'weights/**/*']},
    install_requires=REQUIRED,
    extras_require={'train': TRAIN, 'hub': HUB, 'dev': DEV, 'parity': PARITY},
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
