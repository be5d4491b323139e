"""Conversions of a configuration: to and from plain values, YAML and dotted keys."""

from __future__ import annotations

import dataclasses
import re
import shlex
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastalex.config.schema import MODEL_CONFIGS, Config, DataConfig, LoaderConfig, ModelConfig, Stage
from fastalex.errors import ConfigError

T = TypeVar("T")

# The values of keys in a configuration that is older than they are, where those are not the defaults.
_BEFORE = {"train": {"clip_norm": 0.0}}

# What a value must be, by the words in which OmegaConf refuses it; the group is the value.
_KINDS = {
    r"Value '(.*)' of type '\w+' could not be converted to Float": "must be a number",
    r"Value '(.*)' of type '\w+' could not be converted to Integer": "must be a whole number",
    r"Value '(.*)' is not a valid bool": "must be true or false",
}


def plain(config: Config) -> dict[str, Any]:
    """Return a configuration as plain dicts, lists, strings and numbers."""
    return _as_dict(OmegaConf.structured(config))


def from_plain(content: dict[str, Any]) -> Config:
    """Return what :func:`plain` was given; keys that are newer than the content get what it meant.

    Raises:
        ConfigError: a key or a value that this version does not know.
    """
    model = MODEL_CONFIGS.get(content.get("model", {}).get("name"), ModelConfig)()
    known = OmegaConf.structured(Config(model=model, data=DataConfig(), loader=LoaderConfig()))
    try:
        config = OmegaConf.to_object(OmegaConf.merge(known, _BEFORE, content))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    assert isinstance(config, Config)
    return config


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def as_argument(key: str, value: str) -> str:
    """Return ``key=value`` to be pasted into a shell, in quotes where it or Hydra would read it otherwise."""
    if re.fullmatch(r"[\w./:@%+-]+", value, re.ASCII):
        return f"{key}={value}"
    return shlex.quote(f"{key}={quoted(value)}")


def quoted(value: str) -> str:
    """Return a text in the quotes in which Hydra reads it as it is."""
    return QuotedString(value, Quote.double).with_quotes()


def set_key(config: Config, key: str, value: Any) -> None:
    """Set what a dotted key names to a plain value."""
    *sections, name = key.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section)
    kind = type(getattr(target, name))
    setattr(target, name, kind[value] if isinstance(kind, EnumMeta) else value)


def load_config(folder: Path) -> dict[str, Any]:
    """Read a run's ``config.yaml`` as plain values."""
    return _as_dict(OmegaConf.load(folder / "config.yaml"))


def _as_dict(config: DictConfig | ListConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config, enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def to_dataclass(composed: DictConfig, config_class: type[T]) -> T:
    """Return what Hydra composed as an instance of the dataclass.

    Raises:
        ConfigError: if a mandatory key has no value, or ``+key=value`` added one that does not exist, or
            ``${...}`` refers to what cannot stand there.
    """
    try:
        missing = OmegaConf.missing_keys(composed)
        if missing:
            key = sorted(missing)[0]
            raise ConfigError(f"{key}: has no value; give it as {key}=...")
        # What ${...} stands for has no check of its type against a list's or a section's until it is merged.
        config = OmegaConf.to_object(
            OmegaConf.merge(composed, OmegaConf.to_container(composed, resolve=True))
        )
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    _refuse_additions(composed, config, "")
    return cast(T, config)


def _refuse_additions(composed: DictConfig, config: Any, prefix: str) -> None:
    known = {f.name for f in dataclasses.fields(config)}
    for key in map(str, composed):
        if key not in known:
            raise ConfigError(f"{prefix}{key}={composed[key]}: there is no such key; leave it out")
        if dataclasses.is_dataclass(getattr(config, key)):
            _refuse_additions(composed[key], getattr(config, key), f"{prefix}{key}.")


def model_options(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments that :func:`fastalex.models.create_model` takes beside the name."""
    options = {key: value for key, value in vars(config).items() if key != "name"}
    return {key: value.value if isinstance(value, Enum) else value for key, value in options.items()}


def one_line(error: Exception) -> str:
    """Return the line of OmegaConf's message that names the key, the value and the remedy."""
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    full_key = getattr(cause, "full_key", None)
    if full_key:
        if getattr(cause, "object_type", None) is Stage and "." not in full_key:
            full_key = f"a stage of train.stages: {full_key}"  # OmegaConf checks it before it has a place
        refusal = _refusal(cause, full_key)
        if refusal:
            return refusal
        text = f"{full_key}: {text[0].lower()}{text[1:]}"
    return f"{text}; --help lists every key"


def _refusal(error: Exception, key: str) -> str | None:
    """Return what a value of another type must be; None if OmegaConf refuses something else."""
    text = str(error)
    if re.search("(is not a|with) ListConfig", text):
        value = getattr(error, "value", None)
        return f"{key}: takes a list: {key}=[{'...' if value is None else value}]"
    for pattern, kind in _KINDS.items():
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return f"{key}={match[1]}: {kind}"
    return None
