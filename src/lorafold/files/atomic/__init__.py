"""Outputs that appear whole or not at all: made beside their place, on disk before they are put there, gone on with after a crash.

Nothing here needs torch, and nothing knows what is in the files."""
