"""Train AlexNet fast, on a CPU or a GPU, and still reproduce its published error.

The names in ``__all__`` are the public interface; each is imported when it is first used, so that
``import fastalex`` takes no longer than ``import torch``. The kernels are in :mod:`fastalex.kernels`.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastalex import kernels as kernels
    from fastalex.config import Config as Config
    from fastalex.config import DataConfig as DataConfig
    from fastalex.config import LoaderConfig as LoaderConfig
    from fastalex.config import RuntimeConfig as RuntimeConfig
    from fastalex.config import TrainConfig as TrainConfig
    from fastalex.data import DataSplits as DataSplits
    from fastalex.data import ImageSet as ImageSet
    from fastalex.data import Views as Views
    from fastalex.data import build_loader as build_loader
    from fastalex.data import load_splits as load_splits
    from fastalex.models import create_model as create_model
    from fastalex.runs.prediction import predict_images as predict_images
    from fastalex.runs.weights import TrainedNetwork as TrainedNetwork
    from fastalex.runs.weights import open_weights as open_weights
    from fastalex.runtime import choose_runtime as choose_runtime
    from fastalex.training.evaluation import evaluate_model as evaluate_model
    from fastalex.training.trainer import Trainer as Trainer

_MODULES = {
    "Config": "fastalex.config",
    "DataConfig": "fastalex.config",
    "DataSplits": "fastalex.data",
    "ImageSet": "fastalex.data",
    "LoaderConfig": "fastalex.config",
    "RuntimeConfig": "fastalex.config",
    "TrainConfig": "fastalex.config",
    "TrainedNetwork": "fastalex.runs.weights",
    "Trainer": "fastalex.training.trainer",
    "Views": "fastalex.data",
    "build_loader": "fastalex.data",
    "choose_runtime": "fastalex.runtime",
    "create_model": "fastalex.models",
    "evaluate_model": "fastalex.training.evaluation",
    "load_splits": "fastalex.data",
    "open_weights": "fastalex.runs.weights",
    "predict_images": "fastalex.runs.prediction",
}

__all__ = [*_MODULES, "__version__", "kernels"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "kernels":
        return import_module("fastalex.kernels")
    if name == "__version__":
        return version("fastalex")
    raise AttributeError(f"module 'fastalex' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
