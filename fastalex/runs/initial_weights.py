"""``init_from``: start a network from trained weights, those of a run or of torchvision or timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastalex.config import DataConfig, ModelConfig, TrainConfig
from fastalex.config.plain import model_options
from fastalex.errors import CheckpointError, ConfigError
from fastalex.models.layers import last_layer, layers
from fastalex.models.timm_names import renamed_from_timm
from fastalex.runs.weights import open_weights
from fastalex.shortage import prevented
from fastalex.training.freezing import is_frozen

KEY = "init_from"

# Options of a network that do not change what its weights compute.
_FREE_OPTIONS = ("dropout", "init")
# Keys under which training programs save a state dict beside other things.
_WRAPPERS = ("state_dict", "model")
# Counts of batches, which files of PyTorch before 0.4.1 lack; no result depends on them.
_OPTIONAL = ".num_batches_tracked"


@dataclass(frozen=True)
class InitialWeights:
    """Trained weights to start from.

    Attributes:
        where: the key and value that named them, for messages.
        weights: the state dict, on the CPU.
        classes: names of the classes, in the order of the outputs; None where the file does not say.
        data: how the images were prepared that they were trained on; None where the file does not say.
    """

    where: str
    weights: dict[str, Tensor]
    classes: list[str] | None
    data: DataConfig | None = None

    @classmethod
    def read(cls, path: str, model: nn.Module, config: ModelConfig) -> InitialWeights:
        """Read the weights of a run, or a state dict of torchvision's or timm's same network.

        Args:
            path: a run's folder, a checkpoint, or a file of weights: ``.safetensors``, ``.pt`` or ``.pth``.
            model: the network that is to start from them, with any number of classes, on any device.
            config: its name and options.

        Raises:
            CheckpointError: there is no such file; it is damaged, or of another network.
        """
        file = Path(path).expanduser()
        where = f"{KEY}={path}"
        if not file.is_file() or _is_ours(file):
            trained = open_weights(file, KEY)
            _check_same(trained.config.model, config, where)
            initial = cls(where, trained.weights, trained.classes, trained.config.data)
        else:
            initial = cls(where, _named_as_in(model, _read_state_dict(file, where)), None)
        initial._check_fits(model, config.name)
        return initial

    def warning(self, data: DataConfig) -> str:
        """Return a line if the new images are normalised in another way; empty if not, or not known.

        Args:
            data: how they are prepared.
        """
        if self.data is None or (self.data.mean, self.data.std) == (data.mean, data.std):
            return ""
        return (
            f"{self.where}: was trained on images with data.mean={self.data.mean} data.std={self.data.std}, "
            "and these have others; give the same, which its first layer expects"
        )

    def copy_to(self, model: nn.Module, classes: Sequence[str], config: TrainConfig) -> str:
        """Copy the weights into a network; the last layer keeps its own if the classes are others.

        Args:
            model: the network that :meth:`read` was given, or one with another number of classes.
            classes: names of the classes, in the order of its outputs.
            config: the recipe; ``freeze`` is used.

        Returns:
            A line that says which tensors were taken, which not, and why.

        Raises:
            ConfigError: the last layer is frozen and would have to keep random weights.
        """
        expected = model.state_dict()
        last = last_layer(model)
        of_last = [name for name in expected if name.startswith(f"{last}.")]
        reason = self._why_anew(expected, of_last, classes)
        if reason and is_frozen(model, last, config):
            raise ConfigError(
                f"train.freeze=[{','.join(config.freeze)}]: freezes the last layer, {last}, which has to be "
                f"trained because it starts anew ({reason}); leave it out"
            )
        left = of_last if reason else []
        taken = {name: self.weights[name] for name in expected if name in self.weights and name not in left}
        # Reshaped: timm has a convolution of 1x1 where torchvision has a fully connected layer.
        taken = {name: tensor.reshape(expected[name].shape) for name, tensor in taken.items()}
        model.load_state_dict(taken, strict=False)
        if len(taken) == len(expected):
            return f"{self.where}: all {len(taken)} tensors taken"
        line = f"{self.where}: {len(taken)} of {len(expected)} tensors taken"
        counts = len(expected) - len(taken) - len(left)
        if counts:
            line += f"; {counts} counts of batches start at 0, the file has none"
        return f"{line}; {' and '.join(left)} start anew: {reason}" if left else line

    def _why_anew(self, expected: Mapping[str, Tensor], last: list[str], classes: Sequence[str]) -> str:
        """Return why the last layer starts anew; empty if it does not."""
        if any(name not in self.weights for name in last):
            return "the file has none of that name"
        if any(self.weights[name].shape != expected[name].shape for name in last):
            theirs, ours = (len(each[last[0]]) for each in (self.weights, expected))
            return f"{theirs} classes there, {ours} here"
        if self.classes is None:
            return "the file does not name its classes"
        if self.classes != list(classes):
            pair = next(pair for pair in zip(self.classes, classes, strict=True) if pair[0] != pair[1])
            return f"other classes, {pair[0]!r} there in place of {pair[1]!r}"
        return ""

    def _check_fits(self, model: nn.Module, name: str) -> None:
        """Refuse weights whose tensors are not those of the network, but for the number of its classes."""
        last = last_layer(model)
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        for key in [*expected, *self.weights]:
            ours = expected.get(key)
            theirs = tuple(self.weights[key].shape) if key in self.weights else None
            if key.startswith(f"{last}."):
                fits = theirs is None or (ours is not None and theirs[1:] == ours[1:])
            elif theirs is None:
                fits = key.endswith(_OPTIONAL)
            else:
                fits = ours is not None and theirs in (ours, (*ours, 1, 1))
            if not fits:
                raise CheckpointError(
                    f"{self.where}: is of another network than model.name={name} with its options: "
                    f"{key} is {theirs or 'absent'} there and {ours or 'absent'} here"
                )


def _check_same(theirs: ModelConfig, ours: ModelConfig, where: str) -> None:
    """Refuse the weights of another network, or of one with options that change what it computes."""
    pairs = {"name": (theirs.name, ours.name)}
    if theirs.name == ours.name:
        there, here = model_options(theirs), model_options(ours)
        pairs |= {key: (there[key], here[key]) for key in here if key not in _FREE_OPTIONS}
    for key, (value, wanted) in pairs.items():
        if value != wanted:
            raise CheckpointError(
                f"{where}: is of another network: it has model.{key}={value}, and here model.{key}={wanted}; "
                f"set model.{key}={value}, or name another run"
            )


def _is_ours(file: Path) -> bool:
    """Whether a file is of a run, and not an export; False too for one that cannot be read."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                facts = (opened.metadata() or {}).get("fastalex", "")
                return facts.startswith("{")  # an export has the version of fastalex there
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever a parser can raise; reading it as a state dict says what is wrong
        return False
    return isinstance(content, dict) and "format" in content


def _read_state_dict(file: Path, where: str) -> dict[str, Tensor]:
    """Read a state dict that another program saved; only tensors and plain values, never code.

    Raises:
        CheckpointError: the file is damaged or holds something else.
    """
    if file.suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(
            f"{where}: is neither a run's folder nor a file of weights (.safetensors, .pt, .pth)"
        )
    content: Any
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a parser can raise on bytes that nobody wrote on purpose
        if prevented(error, file.stat().st_size):
            raise
        if isinstance(error, (OSError, SafetensorError)):
            raise CheckpointError(f"{where}: cannot be read; it is damaged or cut short") from error
        raise CheckpointError(
            f"{where}: is damaged, or holds more than tensors and plain values, which is not loaded"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    ):
        raise CheckpointError(f"{where}: holds no state dict, that is, tensors by their names")
    parallel = all(name.startswith("module.") for name in content)  # saved by DistributedDataParallel
    return {name.removeprefix("module.") if parallel else name: tensor for name, tensor in content.items()}


def _named_as_in(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's tensors to the network's names; other files' are left as they are."""
    return renamed_from_timm(weights, list(layers(model))) or weights
