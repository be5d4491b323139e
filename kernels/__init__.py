"""Fused kernels for AlexNet: layers that PyTorch computes in many passes over memory, computed in one.

Each function is one PyTorch operator (`lrn.py`, `augment.py`, `folded_conv.py`, `winograd.py`,
`factored_sgd.py`) with a reference in plain PyTorch (`*_reference.py`) and a Numba implementation for the CPU
(`*_numba*.py`), but for `factored_sgd`, of which plain PyTorch is the fastest there. All but the two
convolutions also have a Triton implementation for CUDA (`*_triton.py`). `folded_block.py` combines
`folded_conv.py` and `lrn.py`; `lazy_batch.py` defers `augment` to the first convolution;
`lrn_module.py` is `local_response_norm` as a layer.
"""

from .augment import augment, ten_crop
from .factored_sgd import factored_sgd
from .folded_block import folded_conv2d_relu_lrn_max_pool
from .folded_conv import folded_conv2d
from .lazy_batch import LazyBatch
from .lrn import local_response_norm, relu_lrn, relu_lrn_max_pool
from .lrn_module import LocalResponseNorm, replace_lrn
from .winograd import winograd_conv2d

__all__ = [
    "LazyBatch",
    "LocalResponseNorm",
    "augment",
    "factored_sgd",
    "folded_conv2d",
    "folded_conv2d_relu_lrn_max_pool",
    "local_response_norm",
    "relu_lrn",
    "relu_lrn_max_pool",
    "replace_lrn",
    "ten_crop",
    "winograd_conv2d",
]
