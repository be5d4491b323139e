"""What each key means, for ``--help``: the comments of ``schema.py``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import typing
from enum import Enum
from functools import cache
from typing import Any

from fastalex.config import schema

_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):.*")


def with_meanings(text: str, config_class: type) -> str:
    """Return YAML with what each key means, as a comment behind its value.

    Args:
        text: YAML of a configuration, a key in each line or a list over several.
        config_class: the dataclass of the configuration.
    """
    known = _meanings(config_class)
    sections: list[str] = []
    lines = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match:
            sections = [*sections[: len(match["indent"]) // 2], match["key"]]
            meaning = known.get(".".join(sections))
            line = f"{line}  # {meaning}" if meaning else line
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def _meanings(config_class: type) -> dict[str, str]:
    """Return the meanings of the keys of a dataclass, by their dotted names."""
    types = typing.get_type_hints(config_class)
    comments = _comments().get(config_class.__name__, {})
    found = {}
    for field in dataclasses.fields(config_class):
        kind = types[field.name]
        if meaning := ": ".join(filter(None, (comments.get(field.name, ""), _choices(kind)))):
            found[field.name] = meaning
        for section in (*schema.MODEL_CONFIGS.values(), kind) if kind is schema.ModelConfig else (kind,):
            if dataclasses.is_dataclass(section):
                assert isinstance(section, type)
                found |= {f"{field.name}.{key}": text for key, text in _meanings(section).items()}
    return found


def _choices(kind: Any) -> str:
    """Return the values of an enumeration, also where None is another; empty for other types."""
    types = [each for each in (kind, *typing.get_args(kind)) if isinstance(each, type)]
    names = [choice.name for each in types if issubclass(each, Enum) for choice in each]
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


@cache
def _comments() -> dict[str, dict[str, str]]:
    """Return the comment of each field of each class of ``schema.py``: that behind it, or else that above."""
    source = inspect.getsource(schema)
    behind: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else behind)[token.start[0]] = token.string.lstrip("# ")
    found: dict[str, dict[str, str]] = {}
    for section in ast.parse(source).body:
        if not isinstance(section, ast.ClassDef):
            continue
        for line in section.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                comment = behind.get(line.lineno) or above.get(line.lineno - 1, "")
                found.setdefault(section.name, {})[line.target.id] = comment
    return found
