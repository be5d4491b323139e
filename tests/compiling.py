"""A substitute for torch.compile's backend, which would need a C++ compiler and minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


class Compiler:
    """Makes torch.compile trace as usual, and run the traced graphs without compiling them.

    Attributes:
        asked: the options of each call of torch.compile.
        graphs: number of traced graphs.
        calls: number of calls that ran a traced graph, and so not those that ran uncompiled.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[dict[str, Any]] = []
        self.graphs = self.calls = 0
        compile_ = torch.compile

        def patched(model: nn.Module, **options: Any) -> Any:
            self.asked.append(options)
            return compile_(model, dynamic=options.get("dynamic"), backend=self._backend)

        monkeypatch.setattr(torch, "compile", patched)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*arguments: Any) -> Any:
            self.calls += 1
            return graph(*arguments)

        return run
