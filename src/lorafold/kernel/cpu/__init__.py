"""The kernel on the CPU: merge.c, how it is loaded, and how a merge is handed to it."""
