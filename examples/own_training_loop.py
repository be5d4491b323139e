"""A training loop of one's own around fastalex's loader and network, on scikit-learn's digits.

python examples/own_training_loop.py [EPOCHS]
"""

import sys

import torch
from torch.nn import functional as F

from fastalex import (
    DataConfig,
    LoaderConfig,
    RuntimeConfig,
    Views,
    build_loader,
    choose_runtime,
    create_model,
    load_splits,
)
from fastalex.config import Flip

torch.manual_seed(0)
data = DataConfig(name="digits", resize=72, crop=64, flip=Flip.none)
runtime = choose_runtime(RuntimeConfig())  # device, arithmetic, memory layout: what is fastest here
splits = load_splits(data, seed=0)
model = runtime.place(create_model("alexnet", len(splits.classes), init="he", dropout=0.0))
options = {"data": data, "loader": LoaderConfig("resident"), "runtime": runtime, "network": model}
training = build_loader(splits.train, views=Views.random, batch_size=64, **options)
test = build_loader(splits.test, views=Views.center, batch_size=64, **options)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, fused=True)

for epoch in range(int(sys.argv[1]) if len(sys.argv) > 1 else 4):
    training.set_epoch(epoch)  # order and crops are a function of seed and epoch
    model.train()
    for images, labels in training:
        with runtime.autocast():
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), runtime.autocast():
        wrong = sum((model(images).argmax(dim=1) != labels).sum().item() for images, labels in test)
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}, test error {wrong / len(splits.test):.4f}", flush=True)
