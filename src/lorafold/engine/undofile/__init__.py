"""What turns a merged checkpoint back into its base without the base: written beside a merge, and read to undo it."""
