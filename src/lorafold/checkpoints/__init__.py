"""A checkpoint on disk: opened, and held to its own word."""
