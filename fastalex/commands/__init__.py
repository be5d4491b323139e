"""What the commands do: each module is imported by the one of its name in ``fastalex``."""
