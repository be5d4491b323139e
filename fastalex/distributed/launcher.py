"""What torchrun says to the processes that it starts, which a command asks before it imports PyTorch.

The environment variables are those of https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

from __future__ import annotations

import os


def is_main() -> bool:
    """Whether this process is rank 0, also before the ranks are connected and without torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
