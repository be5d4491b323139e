"""Packaging of fastalex: `kernels/` and `configs/` are installed inside the `fastalex` package."""

from setuptools import setup

EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
DEV = [
    *EXPORT,
    "hypothesis>=6.100",
    "mypy>=1.14",
    "pyarrow>=18",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.7",
    "ruff>=0.9",
    "timm>=1.0",
]

setup(
    name="fastalex",
    version="0.1.0",
    description="Trains AlexNet fast, on a CPU or a GPU, and still reproduces its error",
    python_requires=">=3.10",
    packages=[
        "fastalex",
        "fastalex.commands",
        "fastalex.config",
        "fastalex.configs",
        "fastalex.data",
        "fastalex.distributed",
        "fastalex.kernels",
        "fastalex.models",
        "fastalex.runs",
        "fastalex.study",
        "fastalex.training",
    ],
    # A top-level package called `kernels` would overwrite the one of that name on PyPI.
    package_dir={"fastalex.kernels": "kernels", "fastalex.configs": "configs"},
    package_data={"fastalex.configs": ["*.yaml", "*/*.yaml"], "fastalex": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "hydra-core>=1.3.2",
        "matplotlib>=3.9",
        "numba>=0.61",
        "numpy>=2.0",
        "pillow>=11",
        "safetensors>=0.5",
        "scikit-learn>=1.6",
        "scipy>=1.13",
        "tensorboard>=2.18",
        "tqdm>=4.67",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda120>=1.48"],
        "dali-cuda13": ["nvidia-dali-cuda130>=1.52"],
        "export": EXPORT,
        "ffcv": ["ffcv==1.0.2"],
        "lars": ["timm>=1.0"],
        "parquet": ["pyarrow>=18"],
        "dev": DEV,
    },
)
