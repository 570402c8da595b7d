"""A plan becomes bytes: blocks of rows are computed, written into a folder that nobody sees yet, read back and compared."""
