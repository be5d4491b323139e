"""Fused kernels for AlexNet: the layers that PyTorch runs in many passes over memory, in one.

Each function has a reference in plain PyTorch (`*_reference.py`), a Numba implementation for the CPU
(`*_numba*.py`) and, but for the two convolutions, a Triton one for CUDA (`*_triton.py`) behind one PyTorch
operator (`lrn.py`, `augment.py`, `folded_conv.py`, `winograd.py`). `folded_block.py` is made of two of these.
"""

from .augment import augment, ten_crop
from .folded_block import folded_conv2d_relu_lrn_max_pool
from .folded_conv import folded_conv2d
from .lazy_batch import LazyBatch
from .lrn import local_response_norm, relu_lrn, relu_lrn_max_pool
from .winograd import winograd_conv2d

__all__ = [
    "LazyBatch",
    "augment",
    "folded_conv2d",
    "folded_conv2d_relu_lrn_max_pool",
    "local_response_norm",
    "relu_lrn",
    "relu_lrn_max_pool",
    "ten_crop",
    "winograd_conv2d",
]
