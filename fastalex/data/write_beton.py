"""``python -m fastalex.data.write_beton key=value ...``: write a data set's .beton files before training.

``loader=ffcv`` writes missing files itself; this command writes them at another time or on another machine.
Training with the same ``data``, ``seed`` and ``loader.beton`` finds the files.
"""

from __future__ import annotations

from pathlib import Path

from fastalex.cli import command
from fastalex.config import BetonConfig
from fastalex.data.datasets import load_splits
from fastalex.errors import ConfigError


def run(config: BetonConfig) -> dict[str, Path]:
    """Write the files of all three splits.

    Args:
        config: the data set, the seed of its split, and the folder of the files.

    Returns:
        The path of each file by the name of its split.

    Raises:
        ConfigError: ``data.resize`` is not positive.
        DataError, OutputError: as for :func:`fastalex.data.beton.ensure_beton`.
    """
    from fastalex.data.beton import ensure_beton

    if config.data.resize < 1:
        raise ConfigError(f"data.resize={config.data.resize}: must be at least 1")
    splits = load_splits(config.data, config.seed)
    paths = {}
    for name in ("train", "validation", "test"):
        paths[name] = ensure_beton(getattr(splits, name), config.data, config.loader)
        print(f"{name}: {paths[name]} ({paths[name].stat().st_size / 1e6:.0f} MB)")
    return paths


@command("write_beton", BetonConfig)
def main(config: BetonConfig, run_dir: Path) -> None:
    """Write the .beton files of a data set."""
    run(config)


if __name__ == "__main__":
    main()
