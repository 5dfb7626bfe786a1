"""Owns where this package is installed; imports nothing, so that a shell can ask at no cost."""

import os


def user_dir() -> str:
    """The folder for fairseq's ``--user-dir``, absolute, also when installed from a wheel."""
    return os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    """Console script ``fairseq-codistill-path``: ``--user-dir "$(fairseq-codistill-path)"``."""
    print(user_dir())


if __name__ == "__main__":
    main()
