"""The command line: a thin face. Each command is a file; what it does is a function elsewhere."""

from .main import command as command
from .main import main as main
