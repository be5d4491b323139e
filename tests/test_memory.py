"""The estimate of a training's GPU memory, and the error of a run that does not fit a limit."""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV3

from fastalex import diagnose, evaluate, train
from fastalex.commands import evaluate as evaluating
from fastalex.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    EvaluateLoader,
    LoaderConfig,
    ModelConfig,
    RuntimeConfig,
    Stage,
    TrainConfig,
)
from fastalex.errors import CheckpointError, ShortageError
from fastalex.models import create_model
from fastalex.runs.checkpoint import Checkpoint
from fastalex.runtime import Runtime, choose_runtime
from fastalex.shortage import Shortage, described, shortage
from fastalex.training.limits import explained
from fastalex.training.memory import PEAK, room_for_images, training_bytes

# The first line of PyTorch's message; more may follow.
FIGURES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which "
    "1.01 GiB is free. Of the allocated memory 13.93 GiB is allocated by PyTorch"
)
QUICK = [
    "data=digits",
    "model=mobilenet_v3_small",
    "data.resize=36",
    "data.crop=32",
    "train.epochs=1",
    "train.accumulate=2",
    "runtime.precision=fp32",
    "hydra.run.dir=run",
]


def config(train: TrainConfig, crop: int = 16) -> Config:
    return Config(model=ModelConfig("resnet18"), data=DataConfig("digits", crop=crop), train=train)


class Layers(nn.Module):
    """Two layers; a forward pass saves 3 x 16 x 16 + 8 values per image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 16 * 16, 8)
        self.second = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.flatten(1)))


WEIGHTS = 4 * (3 * 256 * 8 + 8 + 8 * 4 + 4)


@pytest.mark.parametrize(
    ("recipe", "processes", "copies", "images"),
    [
        ({"batch_size": 10}, 1, 5, 10),
        ({"batch_size": 10, "ema_decay": 0.9}, 1, 7, 10),
        ({"batch_size": 12, "accumulate": 3}, 1, 5, 4),
        ({"batch_size": 12, "accumulate": 3}, 2, 5, 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_bytes_are_copies_of_weights_and_saved_tensors_of_a_part(
    recipe: dict[str, Any], processes: int, copies: int, images: int, dtype: torch.dtype
) -> None:
    kept = images * (3 * 256 + 8) * dtype.itemsize
    found = training_bytes(Layers(), config(TrainConfig(**recipe)), dtype, processes)
    assert found == copies * WEIGHTS + PEAK * kept


def test_the_estimate_matches_what_autograd_saves() -> None:
    """Compared with a real forward pass of AlexNet at its largest stage."""
    recipe = TrainConfig(batch_size=4, stages=[Stage(1, 96, 80)])
    model = create_model("alexnet", dropout=0.0)
    held = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.randn(4, 3, 80, 80))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    found = training_bytes(model, config(recipe, crop=64), torch.float32) - 5 * weights
    assert logits.requires_grad
    assert found == pytest.approx(PEAK * sum(kept.values()), rel=0.02)


def gpu(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int = 0, allocated: int = 0) -> Runtime:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    return replace(runtime, device=torch.device("cuda", 0), dtype=torch.float32)


def test_room_for_images_is_free_memory_minus_training_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(TrainConfig(batch_size=10))
    taken = training_bytes(Layers(), run, torch.float32)
    assert room_for_images(Layers(), run, gpu(monkeypatch, taken + 7)) == 7
    assert room_for_images(Layers(), run, gpu(monkeypatch, taken + 7, reserved=5, allocated=3)) == 9
    assert room_for_images(Layers(), run, gpu(monkeypatch, 0)) == -taken
    assert room_for_images(Layers(), run, choose_runtime(RuntimeConfig(device="cpu"))) is None


def full(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[nn.Module], bool], error: Exception | None = None
) -> None:
    """Make the network's forward pass raise out-of-memory where ``when`` is true."""
    forward = MobileNetV3.forward

    def full_or_forward(self: MobileNetV3, images: Tensor) -> Tensor:
        if images.device.type != "meta" and when(self):
            raise error or torch.OutOfMemoryError(f"{FIGURES}\nException raised from malloc")
        return forward(self, images)

    monkeypatch.setattr(MobileNetV3, "forward", full_or_forward)


def end_of(main: Callable[[], None], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fastalex", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


LINE = (
    f"fastalex: error: {FIGURES} -- lower train.batch_size=128, raise train.accumulate=2, which divides a "
    "batch, or lower data.resize=36 and with it data.crop=32\n"
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_out_of_memory_in_a_run_is_a_one_line_error(
    training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    full(monkeypatch, lambda network: network.training is training)
    assert end_of(train.main, QUICK, monkeypatch) == 1
    assert capsys.readouterr().err.endswith(LINE)


def test_out_of_memory_in_other_commands_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastalex", *QUICK])
    train.main()
    capsys.readouterr()
    whole = evaluating.run(EvaluateConfig(weights="run"))
    fewer = evaluating.run(EvaluateConfig(weights="run", batch_size=100, loader=EvaluateLoader(workers=0)))
    assert fewer.ten_crop.images == whole.ten_crop.images
    assert torch.allclose(fewer.probabilities, whole.probabilities)
    capsys.readouterr()
    full(monkeypatch, lambda network: True)
    assert end_of(evaluate.main, ["checkpoint=run/checkpoint.pt", "batch_size=100"], monkeypatch) == 1
    assert capsys.readouterr().err == f"fastalex: error: {FIGURES} -- lower batch_size=100\n"
    assert end_of(diagnose.main, QUICK, monkeypatch) == 1
    assert capsys.readouterr().err == LINE


@pytest.mark.parametrize(
    "message",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"],
)
def test_out_of_memory_in_a_cuda_library_is_recognised(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    full(monkeypatch, lambda network: True, RuntimeError(message))
    assert end_of(diagnose.main, QUICK, monkeypatch) == 1
    assert capsys.readouterr().err == LINE.replace(FIGURES, message)


def used_up(exhaust: Callable[[], object]) -> tuple[Shortage | None, str]:
    with pytest.raises(Exception) as caught:
        exhaust()
    kind = shortage(caught.value)
    return kind, "" if kind is None else described(kind, caught.value)


def open_files() -> None:
    with ExitStack() as files:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, limit[1]))
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        for _ in range(41):
            files.enter_context(Path(os.devnull).open())


@numba.njit
def in_numba() -> np.ndarray:
    return np.empty(1 << 58)


def print_to_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        print("text", file=full, flush=True)


HUGE = 1 << 58


@pytest.mark.parametrize(
    ("exhaust", "kind", "text"),
    [
        (lambda: torch.empty(HUGE), Shortage.memory, r"out of memory \(DefaultCPUAllocator: can't allocate"),
        (lambda: np.empty(HUGE), Shortage.memory, r"out of memory \(Unable to allocate 2\.00 EiB"),
        (lambda: [None] * HUGE, Shortage.memory, "out of memory"),
        (in_numba, Shortage.memory, r"out of memory \(Allocation failed"),
        (lambda: mmap.mmap(-1, HUGE), Shortage.memory, "out of memory"),
        (
            lambda: torch.UntypedStorage._new_shared(HUGE),
            Shortage.shared_memory,
            r"out of shared memory \(/dev/shm\) \(unable to allocate",
        ),
        (open_files, Shortage.descriptors, "too many open files"),
        (lambda: torch.zeros(2) @ torch.zeros(3), None, ""),
        (lambda: Path("nowhere").read_text(), None, ""),
    ],
)
def test_errors_of_libraries_are_recognised(
    exhaust: Callable[[], object], kind: Shortage | None, text: str
) -> None:
    found, line = used_up(exhaust)
    assert found is kind
    assert re.match(text, line)
    assert "\n" not in line


@pytest.mark.parametrize(("free", "kind"), [(4096, Shortage.shared_memory), (1 << 30, Shortage.output)])
def test_a_full_device_without_a_name_is_shared_memory_only_if_that_is_full(
    free: int, kind: Shortage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed has no file name either, and its disk may be full."""
    monkeypatch.setattr("fastalex.shortage.shared_memory_free", lambda: free)
    assert used_up(print_to_a_full_disk)[0] is kind


@pytest.mark.parametrize("room", [True, False])
def test_an_error_of_onednn_is_a_shortage_where_memory_is_scarce(
    room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says the same of a defect."""
    monkeypatch.setattr("fastalex.shortage.has_room", lambda size: room)
    found = shortage(RuntimeError("could not create a primitive"))
    assert found is (None if room else Shortage.memory)


@pytest.mark.parametrize("room", [True, False])
def test_a_checkpoint_is_not_taken_for_damaged_where_memory_is_full(
    room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one would be resumed from. A damaged one may itself ask for more than there is."""
    path = tmp_path / "checkpoint.pt"
    Checkpoint({"model": {}}, ["a"], {}, {"step": 1}).save(path)

    def load(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr("fastalex.shortage.has_room", lambda size: room)
    with pytest.raises(CheckpointError if room else MemoryError):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            MemoryError(),
            "out of memory -- free some memory, or lower loader.workers=2, or lower train.batch_size=12, "
            "raise train.accumulate=1, which divides a batch, or lower data.resize=256 and with it "
            "data.crop=16",
        ),
        (
            RuntimeError("Caught RuntimeError in worker 0.\nshared memory: No space left on device (28)"),
            "out of shared memory (/dev/shm) (shared memory: No space left on device (28)) -- give it more "
            "room (docker run --shm-size=1g), or lower loader.workers=2, or lower train.batch_size=12",
        ),
        (
            OSError(errno.EMFILE, "Too many open files"),
            "too many open files -- allow more (ulimit -n), or lower loader.workers=2",
        ),
        (
            torch.OutOfMemoryError(
                "Caught OutOfMemoryError in pin memory thread for device 0.\nOriginal Traceback:\n"
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
            ),
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB -- lower "
            "train.batch_size=12, raise train.accumulate=1, which divides a batch, or lower data.resize=256 "
            "and with it data.crop=16",
        ),
        (
            RuntimeError("can't start new thread"),
            "too many processes and threads (can't start new thread) -- allow more (ulimit -u), or lower "
            "loader.workers=2, or set runtime.threads=1",
        ),
    ],
)
def test_a_shortage_is_one_line_that_says_what_to_change(error: Exception, line: str) -> None:
    settings = config(TrainConfig(batch_size=12))
    settings.loader = LoaderConfig("torchvision", workers=2)
    with pytest.raises(ShortageError) as caught, explained(settings):
        raise error
    assert str(caught.value) == line


def test_a_shortage_in_another_place_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def load(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(evaluating, "open_weights", load)
    assert end_of(evaluate.main, ["weights=run"], monkeypatch) == 1
    assert capsys.readouterr().err.startswith("fastalex: error: out of memory -- free some")


def test_other_errors_of_a_network_stay_tracebacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    full(monkeypatch, lambda network: True, RuntimeError("shapes do not match"))
    monkeypatch.setattr(sys, "argv", ["fastalex", *QUICK])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        diagnose.main()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_run_on_the_second_gpu_does_not_use_the_first(tmp_path: Path) -> None:
    arguments = ["fastalex", *QUICK, "runtime.device=cuda:1", "checkpoint.every_steps=2"]
    code = (
        "import sys, torch; from fastalex import train; "
        f"sys.argv = {arguments}; train.main(); "
        "assert torch._C._cuda_hasPrimaryContext(1); assert not torch._C._cuda_hasPrimaryContext(0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
