"""Carrying out a plan: tensors streamed in the order of the files, a block of rows at a time, into a folder not yet visible."""
