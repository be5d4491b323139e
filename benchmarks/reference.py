"""AlexNet on CIFAR-10 in plain eager PyTorch: the speed baseline and the oracle. Imports none of fastalex.

    python -m benchmarks.reference --data ROOT [--epochs 90] [--batch-size 128] [--limit-steps 10]

fp32, NCHW, stock modules, torchvision transforms, DataLoader and SGD. The settings are those of Krizhevsky,
Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012), without its
split over two devices and with PyTorch's default initialisation. As in the seed program, validation images
get the training augmentation. Ten-crop is not also flipped: it holds each crop's mirror image already.
"""

import argparse
import os
import time
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, Dataset, random_split
from torchvision import datasets, transforms

NORMALIZE = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[1.0, 1.0, 1.0])
WORKERS = min(8, os.cpu_count() or 1)


class AlexNet(nn.Module):
    """(N, 3, H, W) float images, 224 or any size from 63 up, to (N, num_classes) logits."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        # PyTorch divides alpha by the window and the paper does not: 5e-4 over 5 is the paper's alpha = 1e-4.
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(96, 256, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(256, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(images)))


def train_transform() -> transforms.Compose:
    """PIL image to (3, 224, 224) float: resize to 256, random crop, random flip, normalise."""
    crop_and_flip = [transforms.RandomCrop(224), transforms.RandomHorizontalFlip()]
    return transforms.Compose([transforms.Resize(256), *crop_and_flip, transforms.ToTensor(), NORMALIZE])


def ten_crop_transform() -> transforms.Compose:
    """PIL image to (10, 3, 224, 224) float: corners and centre of the 256 image, then their mirrors."""
    ten_crops = [transforms.TenCrop(224), torch.stack]
    return transforms.Compose([transforms.Resize(256), transforms.ToTensor(), NORMALIZE, *ten_crops])


class DataError(Exception):
    """The data cannot be read; the last line of the message says why."""


def open_image(path: str) -> Image.Image:
    """Read a file as RGB."""
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise DataError(f"{path} is not a complete image: {error}") from error


def open_split(root: Path, split: str, transform: transforms.Compose) -> datasets.VisionDataset:
    """`split` ("train" or "test") of CIFAR-10, from its pickles or from a tree `{train,test}/CLASS/*.jpg`."""
    try:
        if (root / datasets.CIFAR10.base_folder).is_dir():
            return datasets.CIFAR10(root, train=split == "train", transform=transform)
        return datasets.ImageFolder(root / split, transform=transform, loader=open_image)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"--data {root}: no intact CIFAR-10 pickles or {split}/CLASS/*.jpg: {error}"
        ) from error


def train_loader(dataset: Dataset, batch_size: int = 128, workers: int = WORKERS) -> DataLoader:
    """Shuffled batches of (N, 3, 224, 224) float images and (N,) int64 labels."""
    pin, keep = torch.cuda.is_available(), workers > 0
    return DataLoader(dataset, batch_size, True, num_workers=workers, pin_memory=pin, persistent_workers=keep)


def train_step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """One step on a batch on the model's device; returns its mean cross-entropy before the update."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(
    model: nn.Module, optimizer: Optimizer, loader: DataLoader, limit: int | None = None
) -> tuple[float, float]:
    """Mean loss over batches, and images/s without the first batch, unless it is the only one."""
    device = next(model.train().parameters()).device
    losses: list[Tensor] = []
    images_timed, start = 0, time.perf_counter()
    for images, labels in islice(loader, limit):
        if len(losses) == 1:
            losses[0].item()  # wait for a GPU before the clock starts
            images_timed, start = 0, time.perf_counter()
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        losses.append(train_step(model, optimizer, images, labels))
        images_timed += len(labels)
    return torch.stack(losses).mean().item(), images_timed / (time.perf_counter() - start)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, limit: int | None = None) -> tuple[float, float]:
    """Top-1 and top-5 error; images of shape (N, views, 3, H, W) are scored by their views' mean softmax."""
    device = next(model.eval().parameters()).device
    hits = []
    for images, labels in islice(loader, limit):
        views = images.to(device).reshape(-1, *images.shape[-3:])
        scores = model(views).softmax(dim=1).unflatten(0, (len(labels), -1)).mean(dim=1)
        hits.append(scores.topk(min(5, scores.shape[1])).indices == labels.to(device)[:, None])
    top5 = torch.cat(hits).float()
    return 1 - top5[:, 0].mean().item(), 1 - top5.sum(dim=1).mean().item()


def ten_crop_evaluate(
    model: nn.Module, dataset: Dataset, workers: int = WORKERS, limit: int | None = None
) -> tuple[float, float]:
    """Top-1 and top-5 error of a dataset that yields `ten_crop_transform`'s views, 12 images a batch."""
    return evaluate(model, DataLoader(dataset, batch_size=12, num_workers=workers), limit)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    data = open_split(args.data, "train", train_transform())
    test = open_split(args.data, "test", ten_crop_transform())
    if data.classes != test.classes or len(data) < 5:
        raise DataError(f"--data {args.data}: train and test differ in classes, or train has under 5 images")
    train, validation = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(args.seed))
    loader = train_loader(train, args.batch_size, args.num_workers)
    validation_loader = DataLoader(validation, args.batch_size, num_workers=args.num_workers)
    model = AlexNet(len(data.classes)).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2)
    for epoch in range(1, args.epochs + 1):
        loss, speed = train_epoch(model, optimizer, loader, args.limit_steps)
        top1, top5 = evaluate(model, validation_loader, args.limit_steps)
        rate = scheduler.get_last_lr()[0]
        print(f"epoch {epoch}: {speed:.1f} images/s, learning rate {rate:g}, loss {loss:.4f}", end=", ")
        print(f"validation top-1 error {top1:.4f}, top-5 error {top5:.4f}", flush=True)
        scheduler.step(top1)
    top1, top5 = ten_crop_evaluate(model, test, args.num_workers, args.limit_steps)
    print(f"test, ten-crop: top-1 error {top1:.4f}, top-5 error {top5:.4f}")


def main(arguments: list[str] | None = None) -> None:
    """Train AlexNet, print images/s and validation errors every epoch, then the ten-crop test errors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help="the data set's folder")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--num-workers", type=int, default=WORKERS, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-steps", type=int, help="batches a pass, to measure throughput (all)")
    args = parser.parse_args(arguments)
    for name, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "num_workers": 0, "limit_steps": 1}.items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    try:
        run(args)
    except DataError as error:  # from a loader process it starts with a traceback
        parser.exit(2, f"{parser.prog}: error: {str(error).splitlines()[-1]}\n")


if __name__ == "__main__":
    main()
