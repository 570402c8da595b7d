"""Adapters on disk: which format, what they hold, with which scaling. What comes out is always an `Adapter`."""
