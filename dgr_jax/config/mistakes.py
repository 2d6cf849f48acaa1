"""What a user can be told to mend."""

from __future__ import annotations

FLAGS = {"MODEL_DIR": "--model_dir", "DATA_DIR": "--data_dir"}


class Mistake(ValueError):
    """What was asked for cannot be: the message says what is wrong, and what to give instead.

    status: of the command that ends with it.
    """

    status = 2


class Failure(Mistake):
    """What was asked for was tried, and a part of it did not succeed: the message says which."""

    status = 1
