"""Checkpoints: everything a run needs to be evaluated or taken further, in one file."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastalex.config import Config
from fastalex.config.plain import from_plain
from fastalex.errors import CheckpointError, ConfigError
from fastalex.files import replacing
from fastalex.shortage import prevented

FORMAT = 1
FINAL_WEIGHTS = "model.safetensors"  # in a run's folder
DIGEST = "images_digest"  # key of the digest of the run's images, in its summary, checkpoints and weights


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        config: the run's configuration, as plain values.
        classes: their names, in the order of the network's outputs.
        model: the network's state dict.
        training: states of the optimizer, the schedule and the generators, the counters, and the history.
        average: the state dict of the averaged weights, which are then what counts; None where none are kept.
    """

    config: dict[str, Any]
    classes: list[str]
    model: dict[str, torch.Tensor]
    training: dict[str, Any]
    average: dict[str, torch.Tensor] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.training["step"])

    def snapshot(self, device: str | None = None) -> Checkpoint:
        """Return a copy that later training steps do not change, on another device if one is named."""
        return Checkpoint(**_copied(vars(self), device))

    def save(self, path: Path, before_replacing: Callable[[], None] = lambda: None) -> None:
        """Write the file atomically; on an OutputError the old file stays as it was.

        Args:
            path: the file.
            before_replacing: called when the new file is complete, and the old one still in its place.
        """
        with replacing(path, before_replacing) as temporary:
            try:
                with temporary.open("wb") as file:
                    torch.save({"format": FORMAT, **vars(self)}, file)
            except RuntimeError as error:
                # What went wrong in writing is the cause; PyTorch then fails to finish its archive.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    @classmethod
    def load(cls, path: Path, key: str = "checkpoint") -> Checkpoint:
        """Read a file; only tensors and plain values are unpickled, never code.

        The file is a zip archive with a CRC-32 of each of its members, which is compared first.

        Args:
            path: the file.
            key: the configuration key that named it, for error messages.

        Raises:
            CheckpointError: if it is missing, damaged, or not a checkpoint of fastalex.
        """
        if not path.is_file():
            raise CheckpointError(f"{key}={path}: there is no such file; a run leaves RUN/checkpoint.pt")
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        except Exception as error:  # whatever a parser can raise on bytes that nobody wrote on purpose
            if prevented(error, path.stat().st_size):
                raise
            if isinstance(error, PermissionError):
                raise CheckpointError(f"{key}={path}: cannot be read ({error.strerror})") from error
            raise CheckpointError(
                f"{key}={path}: is damaged or cut short; use an older checkpoint or train again"
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{key}={path}: was not written by this version of fastalex")
        try:
            checkpoint = cls(**content)
        except TypeError as error:
            raise CheckpointError(f"{key}={path}: lacks a part; train again") from error
        checkpoint._check_types(path, key)
        return checkpoint

    def _check_types(self, path: Path, key: str) -> None:
        states = [self.model, *([] if self.average is None else [self.average])]
        if (
            not all(isinstance(part, dict) for part in (self.config, self.training, *states))
            or not isinstance(self.config.get("model"), dict)
            or not _is_names(self.classes)
            or not all(isinstance(tensor, torch.Tensor) for state in states for tensor in state.values())
        ):
            raise CheckpointError(f"{key}={path}: a part of it is not what it should be; train again")

    def restore_config(self) -> Config:
        """Return the run's configuration.

        Raises:
            CheckpointError: if it has keys or values that this version does not know.
        """
        try:
            return from_plain(self.config)
        except ConfigError as error:
            raise CheckpointError(
                f"the checkpoint's configuration is from another version: {error}"
            ) from error


def save_weights(
    weights: dict[str, torch.Tensor], path: Path, config: dict[str, Any], classes: list[str], **facts: Any
) -> None:
    """Write weights, fp32, in the safetensors format, with what is needed to rebuild the network.

    Args:
        weights: the network's state dict.
        path: of the file.
        config: as plain values.
        classes: in the order of the outputs.
        facts: what else the metadata is to say.

    Raises:
        OutputError: if it cannot be written; a file that was there is left.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    facts = {"config": config, "classes": classes, "crc32": _crc32(tensors), **facts}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"fastalex": json.dumps(facts)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_weights(path: Path, key: str = "weights") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the weights that :func:`save_weights` wrote, and its metadata.

    Args:
        path: of the file.
        key: the configuration key that named it, for error messages.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by fastalex.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        if path.is_file() and prevented(error, path.stat().st_size):
            raise
        if path.is_file() and not os.access(path, os.R_OK):
            raise CheckpointError(f"{key}={path}: cannot be read (permission denied)") from error
        raise CheckpointError(
            f"{key}={path}: is missing, damaged or cut short; use the run's checkpoint.pt or train again"
        ) from error
    try:
        facts = json.loads(metadata["fastalex"])
        if not isinstance(facts["config"]["model"], dict) or not _is_names(facts["classes"]):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{key}={path}: does not say what network its weights are of; fastalex did not write it"
        ) from error
    if "crc32" in facts and facts["crc32"] != _crc32(weights):  # files of older versions have none
        raise CheckpointError(
            f"{key}={path}: is damaged (it has another checksum); use the run's checkpoint.pt or train again"
        )
    return weights, facts


def _crc32(tensors: dict[str, torch.Tensor]) -> int:
    """Return a CRC-32 of tensors' bytes, in the order of their names; safetensors has no checksum."""
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _copied(value: Any, device: str | None) -> Any:
    """Copy what is nested in dicts, lists and tuples; tensors keep their layout."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, device) for item in value)
    return value
