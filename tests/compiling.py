"""What stands in for torch.compile's own backend, which takes a C++ compiler and minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


class Compiler:
    """Has torch.compile trace as it always does, and run what it traced as it is.

    Attributes:
        asked: what torch.compile was told beside the network, one entry a call.
        graphs: how many were traced.
        calls: how many ran a traced graph; a call that runs uncompiled is none.
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
