"""One place that opens trained weights: a run's folder, a checkpoint or a ``.safetensors`` file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from fastalex.config import Config, Graph, Precision
from fastalex.config.checks import validate
from fastalex.config.plain import from_plain, model_options
from fastalex.errors import CheckpointError, ConfigError
from fastalex.models import create_model, load_weights
from fastalex.runs.checkpoint import DIGEST, FINAL_WEIGHTS, Checkpoint, read_weights
from fastalex.runs.checkpoint_writer import NEWEST
from fastalex.runtime import Runtime, choose_runtime


@dataclass(frozen=True)
class TrainedNetwork:
    """A network's weights, and what is needed to use them.

    Attributes:
        source: the file that the weights were read from.
        where: the key and value that named it, for error messages.
        config: the run's configuration; its ``data`` says how images are prepared.
        classes: names of the classes, in the order of the network's outputs.
        weights: the network's state dict, on the CPU; the averaged weights where the run kept an average.
        digest: of the run's images; None where the file does not say.
    """

    source: Path
    where: str
    config: Config
    classes: list[str]
    weights: dict[str, Tensor]
    digest: str | None = None

    def runtime(self, device: str = "auto", precision: Precision | None = None) -> Runtime:
        """Choose how to compute with the network here: as its run did, on another device if need be.

        All threads are used, however many the run used.

        Args:
            device: auto, cpu, cuda, ...
            precision: None for that of the run; where that was auto, the fastest here.

        Raises:
            ConfigError: the device does not exist, or does not support the precision.
        """
        config = self.config.runtime
        graph = Graph.off if config.graph is Graph.off else Graph.network  # there is no training step here
        precision = precision or config.precision
        return choose_runtime(replace(config, device=device, precision=precision, graph=graph, threads=0))

    def loading(self, batch_size: int | None = None, workers: int | None = None) -> Config:
        """Return the run's configuration with images that are loaded otherwise, which changes no figure.

        Args:
            batch_size: images that are computed together; None for that of the run.
            workers: as ``loader.workers``; None for that of the run.

        Raises:
            ConfigError: a number is too small.
        """
        config = self.config
        if batch_size is not None:
            if batch_size < 1:
                raise ConfigError(f"batch_size={batch_size}: must be at least 1")
            config = replace(config, train=replace(config.train, batch_size=batch_size))
        if workers is not None:
            if workers < -1:
                raise ConfigError(f"loader.workers={workers}: must be at least -1")
            config = replace(config, loader=replace(config.loader, workers=workers))
        return config

    def model(self) -> nn.Module:
        """Build the network with these weights, in fp32 on the CPU.

        Raises:
            CheckpointError: the weights belong to another network than the file says, or there is no such
                network.
        """
        config = self.config.model
        try:
            model = create_model(config.name, len(self.classes), **model_options(config))
        except ConfigError as error:
            raise CheckpointError(f"{self.where}: its network cannot be built: {error}") from error
        try:
            load_weights(model, self.weights)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        return model


def open_weights(path: Path | str, key: str = "weights") -> TrainedNetwork:
    """Read the trained weights that a path names.

    ===================================  ====================================================
    path                                 weights
    ===================================  ====================================================
    a run's folder                       its final weights, ``model.safetensors``; of a run
                                         that has not ended, those of ``checkpoint.pt``
    ``checkpoint.pt``,                   those of the checkpoint
    ``checkpoint-STEP.pt``
    ``model.safetensors``,               those of the file, which is enough without its run
    ``best.safetensors``
    ===================================  ====================================================

    Args:
        path: the folder or file.
        key: the configuration key that named it, for error messages.

    Raises:
        CheckpointError: there is no such file, or it is damaged, of another kind or of another version.
    """
    path = Path(path).expanduser()
    where = f"{key}={path}"
    file = _find(path, where)
    if file.suffix == ".safetensors":
        weights, facts = read_weights(file, key)
        content, classes, digest = facts["config"], facts["classes"], facts.get(DIGEST)
    else:
        checkpoint = Checkpoint.load(file, key)
        content, classes, digest = checkpoint.config, checkpoint.classes, checkpoint.training.get(DIGEST)
        weights = checkpoint.average or checkpoint.model
    try:
        config = from_plain(content)
    except ConfigError as error:
        raise CheckpointError(f"{where}: its configuration is from another version: {error}") from error
    try:
        validate(config)
    except ConfigError as error:
        raise CheckpointError(f"{where}: its configuration cannot work: {error}") from error
    return TrainedNetwork(file, where, config, classes, weights, digest)


def _find(path: Path, where: str) -> Path:
    """Return the file of the weights."""
    if path.is_dir():
        for name in (FINAL_WEIGHTS, NEWEST):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{where}: the folder holds neither {FINAL_WEIGHTS} nor {NEWEST}")
    if not path.is_file():
        raise CheckpointError(
            f"{where}: there is no such file; name a run's folder, or its {FINAL_WEIGHTS} or {NEWEST}"
        )
    if path.suffix not in (".pt", ".safetensors"):
        raise CheckpointError(
            f"{where}: is neither a checkpoint (.pt) nor weights (.safetensors); name a run's folder, or its "
            f"{FINAL_WEIGHTS} or {NEWEST}"
        )
    return path
