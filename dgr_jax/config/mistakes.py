"""What a user can be told to mend."""

from __future__ import annotations

FLAGS = {"MODEL_DIR": "--model_dir", "DATA_DIR": "--data_dir"}


class Mistake(ValueError):
    """What was asked for cannot be: the message says what is wrong, and what to give instead."""
