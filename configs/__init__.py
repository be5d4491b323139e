"""The YAML files that Hydra composes; see :mod:`fastalex.config` for what each key means."""
