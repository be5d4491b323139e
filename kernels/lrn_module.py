"""`local_response_norm` as a layer, in the place of `torch.nn.LocalResponseNorm` in any network."""

from __future__ import annotations

from torch import Tensor, nn

from .lrn import local_response_norm


class LocalResponseNorm(nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm`, computed in one pass by `local_response_norm`.

    Arguments, attributes and representation are those of the base class. Like it, the layer has no weights.

    Shape:
        input (N, C, L), (N, C, H, W) or (N, C, D, H, W), fp32, bf16, fp16 or float64; output the same.
        Channels-last is fastest: other memory formats are copied to it and back.
    """

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k)


def replace_lrn(model: nn.Module) -> int:
    """Change each `torch.nn.LocalResponseNorm` of a network to `LocalResponseNorm`, in place.

    The layers remain the same objects, so that hooks, training flags and references to them are kept.
    Subclasses of `torch.nn.LocalResponseNorm` are left alone: their arithmetic may be another.

    Args:
        model: the network, or the layer itself.

    Returns:
        The number of layers that were changed; a layer that is used in several places counts once.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.LocalResponseNorm]
    for layer in layers:
        layer.__class__ = LocalResponseNorm
    return len(layers)
