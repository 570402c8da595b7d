"""``python -m lorafold`` is the command ``lorafold``."""

from .cli import main

if __name__ == "__main__":
    main()
