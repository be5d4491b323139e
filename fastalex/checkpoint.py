"""Checkpoints: everything a run needs to be evaluated or taken further, in one file."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file
from torch import nn

from fastalex.config import AlexNetConfig, Config, DataConfig, LoaderConfig, ModelConfig, model_options
from fastalex.errors import CheckpointError, ConfigError
from fastalex.files import replacing
from fastalex.models import create_model

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

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

    def save(self, path: Path) -> None:
        """Write the file as a whole, or raise OutputError and leave the one that was there."""
        with replacing(path) as temporary:
            torch.save({"format": FORMAT, **vars(self)}, temporary)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file; only tensors and plain values are unpickled, never code.

        Raises:
            CheckpointError: if it is missing, cut short, or not a checkpoint of fastalex.
        """
        if not path.is_file():
            raise CheckpointError(f"checkpoint={path}: there is no such file; a run leaves RUN/checkpoint.pt")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"checkpoint={path}: is damaged or cut short; use an older checkpoint or train again"
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError(f"checkpoint={path}: was not written by this version of fastalex")
        try:
            return cls(**content)
        except TypeError as error:
            raise CheckpointError(f"checkpoint={path}: lacks a part; train again") from error

    def restore_config(self) -> Config:
        """Return the run's configuration.

        Raises:
            CheckpointError: if it has keys or values that this version does not know.
        """
        named = self.config.get("model", {}).get("name")
        model = AlexNetConfig() if named == "alexnet" else ModelConfig()
        known = OmegaConf.structured(Config(model=model, data=DataConfig(), loader=LoaderConfig()))
        try:
            config = OmegaConf.to_object(OmegaConf.merge(known, self.config))
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint's configuration is from another version: {reason}"
            ) from error
        assert isinstance(config, Config)
        return config

    def restore_model(self) -> nn.Module:
        """Return the network with the checkpoint's weights, or their average, on the CPU.

        Raises:
            CheckpointError: if the weights belong to another network.
        """
        config = self.restore_config().model
        try:
            model = create_model(config.name, len(self.classes), **model_options(config))
        except ConfigError as error:
            raise CheckpointError(f"the checkpoint's network cannot be built: {error}") from error
        load_weights(model, self.average or self.model)
        return model


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy a state dict into a network of the same architecture.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        ours = tuple(expected[name].shape) if name in expected else None
        theirs = tuple(weights[name].shape) if name in weights else None
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint is of another architecture: {name} is {theirs or 'absent'} there and "
                f"{ours or 'absent'} in the network asked for"
            )
    model.load_state_dict(weights)


def plain(config: Config) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists, strings and numbers."""
    content = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def save_weights(model: nn.Module, config: Config, classes: list[str], path: Path) -> None:
    """Write a network's weights, fp32, in the safetensors format, with what is needed to rebuild it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"fastalex": json.dumps({"config": plain(config), "classes": classes})}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata=metadata)
