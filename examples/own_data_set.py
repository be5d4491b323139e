"""A data set of one's own, from arrays: trained on with fastalex's trainer and tested with ten crops.

python examples/own_data_set.py [EPOCHS]
"""

import sys

import numpy as np
import torch

from fastalex import (
    Config,
    DataConfig,
    DataSplits,
    ImageSet,
    LoaderConfig,
    RuntimeConfig,
    TrainConfig,
    Trainer,
    Views,
    build_loader,
    choose_runtime,
    create_model,
    evaluate_model,
)
from fastalex.config import ModelConfig


def stripes(count: int, seed: int) -> ImageSet:
    """Noisy images of 32x32 pixels: upright stripes are class 0, level ones class 1."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    upright = np.broadcast_to(np.arange(32) // 4 % 2 * 128, (32, 32))
    images = np.where(labels[:, None, None] == 0, upright, upright.T) + generator.integers(
        0, 64, (count, 32, 32)
    )
    return ImageSet(labels, pixels=np.repeat(images[..., None], 3, axis=3).astype(np.uint8))


config = Config(
    model=ModelConfig("resnet18"),
    data=DataConfig(name="stripes", resize=40, crop=32),
    loader=LoaderConfig("resident"),
    train=TrainConfig(epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 2, batch_size=32, lr=0.02),
)
splits = DataSplits(stripes(512, 0), stripes(128, 1), stripes(128, 2), ("upright", "level"), source="stripes")
runtime = choose_runtime(RuntimeConfig())
torch.manual_seed(config.seed)
model = runtime.place(create_model(config.model.name, len(splits.classes)))
loaders = [
    build_loader(
        images, config.data, config.loader, views=views, batch_size=config.train.batch_size, runtime=runtime
    )
    for images, views in ((splits.train, Views.random), (splits.validation, Views.center))
]
trainer = Trainer(model, config.train, *loaders, runtime)
while not trainer.finished:
    epoch = trainer.run_epoch()
    error = epoch.validation_top1_error
    print(f"epoch {epoch.epoch}: loss {epoch.train_loss:.4f}, validation error {error:.4f}")
evaluation = evaluate_model(model, splits.test, config, runtime)
print(evaluation.table("test set"))
