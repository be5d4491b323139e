"""A training run: from a configuration to a trainer, its folder, its checkpoints, and how it is resumed."""
