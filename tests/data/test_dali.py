"""Properties of the DALI loader alone; those of all loaders are in test_agreement.py."""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from fastalex.config import DataConfig, LoaderConfig
from fastalex.data import ImageSet, Views
from fastalex.errors import DataError, MissingDependencyError
from tests.runtimes import loader_on

dali = pytest.importorskip(
    "nvidia.dali", reason="NVIDIA DALI is not installed: .ci/install-loaders PYTHON", exc_type=ImportError
)

DATA = DataConfig(name="test", resize=40, crop=32)


def dali_loader(
    images: ImageSet, views: Views = Views.center, data: DataConfig = DATA, **options: Any
) -> Any:
    settings = {"batch_size": 4, **options}
    return loader_on(images, data, LoaderConfig(name="dali", workers=2), views=views, **settings)


def arrays(size: tuple[int, int], count: int = 8) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return ImageSet(np.arange(count), pixels=pixels)


def test_enlarging_equals_torch_in_float32() -> None:
    images, data = arrays((32, 32)), DataConfig(name="test", resize=256, crop=256, mean=[0.0] * 3)
    planes = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float()
    expected = interpolate(planes, (256, 256), mode="bilinear", antialias=True)
    (found, _), *_ = dali_loader(images, data=data, batch_size=8)
    torch.testing.assert_close(found, expected / 255, rtol=2**-22, atol=0)  # dividing rounds


def test_dalis_own_resize_differs_at_the_edges_only() -> None:
    """The reason for `_resize_as_torchvision`: if this fails, DALI has changed and it can be removed."""

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def plain() -> Any:
        image = dali.fn.external_source(
            source=lambda: [np.array(source)], dtype=dali.types.UINT8, ndim=3, layout="HWC"
        )
        return dali.fn.resize(
            image,
            resize_x=40,
            resize_y=40,
            interp_type=dali.types.INTERP_LINEAR,
            antialias=True,
            dtype=dali.types.FLOAT,
        )

    source = arrays((100, 90), 1).pixels[0]
    found = torch.from_dlpack(plain().run()[0].as_tensor())[0].double()
    planes = torch.from_numpy(source).permute(2, 0, 1)[None].double()
    expected = interpolate(planes, (40, 40), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    difference = (found - expected).abs()
    assert difference.max() > 1
    assert difference[1:-1, 1:-1].max() < 1e-3


def operators(pipeline: Any) -> Counter[tuple[str, str]]:
    """Kind and device of every operator in a graph; DALI checks the graph when it serialises it."""
    assert pipeline.serialize()
    return Counter(
        (re.sub(r"_*(\w+?)_\d+", r"\1", operator.name), operator.outputs[0].device)
        for operator in pipeline._ops
    )


@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("kind", ["files", "small arrays", "large arrays"])
def test_the_gpu_graph_is_built_from_the_same_definition(kind: str, views: Views, files: ImageSet) -> None:
    """Without a GPU it cannot run, but every operator's device and arguments are checked."""
    images = {"files": files, "small arrays": arrays((32, 32)), "large arrays": arrays((90, 90))}[kind]
    loader = dali_loader(images, views)
    on_gpu = operators(loader.build_pipeline(None, gpu=True))
    on_cpu = operators(loader.build_pipeline(None))
    assert {device for _, device in on_cpu} == {"cpu"}
    crops = 10 if views is Views.ten_crop else 1
    assert on_gpu["CropMirrorNormalize", "gpu"] == on_cpu["CropMirrorNormalize", "cpu"] == crops
    assert on_gpu["Resize", "gpu"] >= 1
    decoders = [device for name, device in on_gpu if "Image" in name]
    assert decoders == (["gpu"] if kind == "files" else [])
    copies = {"Copy", "MakeContiguous"}
    kinds = [{name for name, _ in graph if name not in copies} for graph in (on_gpu, on_cpu)]
    assert kinds[0] == kinds[1]


@pytest.mark.gpu
@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("kind", ["files", "small arrays", "large arrays"])
def test_gpu_agrees_with_cpu(kind: str, views: Views, files: ImageSet) -> None:
    images = {"files": files, "small arrays": arrays((32, 32)), "large arrays": arrays((90, 90))}[kind]
    tolerance = 4 / 255 if kind == "files" else 1e-4  # nvJPEG's inverse transform rounds differently
    for (found, labels), (expected, _) in zip(
        dali_loader(images, views, device="cuda"), dali_loader(images, views), strict=True
    ):
        assert found.is_cuda
        assert labels.is_cuda
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["image.webp", "image.tiff", "image.gif", "image.ppm", "png-called.jpg"])
def test_other_formats_come_through_pillow(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).convert("RGB")
    image.save(tmp_path / name, "PNG" if name == "png-called.jpg" else None)
    images = ImageSet(np.zeros(1, np.int64), paths=(tmp_path / name,))
    ((found, _),) = dali_loader(images, data=DataConfig(name="test", resize=40, crop=40, mean=[0.0] * 3))
    expected = torch.from_numpy(images.image(0)).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="cut in half"),
        pytest.param(lambda data: data[:40], id="cut in the header"),
        pytest.param(lambda data: b"not an image at all", id="text"),
        pytest.param(lambda data: b"", id="empty"),
    ],
)
def test_a_damaged_file_is_named(
    suffix: str, damage: Callable[[bytes], bytes], files: ImageSet, tmp_path: Path
) -> None:
    victim = tmp_path / f"victim.{suffix}"
    Image.open(files.paths[7]).save(victim)
    whole = victim.read_bytes()
    images = ImageSet(files.labels, paths=(*files.paths[:7], victim, *files.paths[8:]))
    loader = dali_loader(images)
    assert sum(len(labels) for _, labels in loader) == 12
    victim.write_bytes(damage(whole))
    with pytest.raises(DataError, match=r"victim\.\w+ is not a whole image"):
        list(loader)
    victim.write_bytes(whole)  # the loader works again
    assert sum(len(labels) for _, labels in loader) == 12


def test_a_vanished_file_is_named(files: ImageSet) -> None:
    loader = dali_loader(files)
    files.paths[3].unlink()
    with pytest.raises(DataError, match=r"3\.jpg cannot be read: No such file"):
        list(loader)


def test_other_threads_read_each_file_once(files: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastalex.data import dali as module

    read, encoded = [], module._encoded

    def spy(path: Path) -> Any:
        read.append((path, threading.current_thread() is threading.main_thread()))
        return encoded(path)

    monkeypatch.setattr(module, "_encoded", spy)
    labels = torch.cat([labels for _, labels in dali_loader(files)])
    assert labels.tolist() == list(range(12))
    assert not any(main for _, main in read)
    assert sorted(path for path, _ in read) == sorted(files.paths or ())  # each once


def test_float32_batches_are_not_copied(files: ImageSet) -> None:
    """The batch is a view of a DALI buffer, which torch did not allocate."""
    (batch, _), *_ = dali_loader(files)
    assert batch._is_view()
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_missing_package_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastalex.data.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "fastalex\[dali\]"') as caught:
        dali_loader(arrays((32, 32)))
    assert "\n" not in str(caught.value)
