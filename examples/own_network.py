"""A fused kernel in one's own network: ReLU, local response normalisation and max pooling in one pass.

python examples/own_network.py [STEPS]
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex.kernels import relu_lrn_max_pool


class Network(nn.Module):
    """Two convolutions; the first is followed by the kernel, or by the three layers that it replaces."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.output = nn.Linear(64, 2)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.fused:
            x = relu_lrn_max_pool(x, size=5, alpha=1e-4, beta=0.75, k=2.0)
        else:
            x = F.max_pool2d(F.local_response_norm(F.relu(x), 5, 1e-4, 0.75, 2.0), 3, 2)
        return self.output(F.relu(self.conv2(x)).mean(dim=(2, 3)))


torch.manual_seed(0)
network, plain = Network(fused=True), Network(fused=False)
plain.load_state_dict(network.state_dict())
network = network.to(memory_format=torch.channels_last)  # the layout that the kernel works in
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
labels = torch.arange(64) % 2
images = torch.randn(64, 3, 32, 32) + labels[:, None, None, None]  # the classes differ in brightness
images = images.to(memory_format=torch.channels_last)

print(f"largest difference to plain PyTorch: {(network(images) - plain(images)).abs().max().item():.1e}")
for step in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.4f}")
