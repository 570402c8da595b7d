"""``python -m lorafold`` is the command ``lorafold``."""

from .cli import command

if __name__ == "__main__":
    command()
