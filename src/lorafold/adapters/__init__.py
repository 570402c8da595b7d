"""Adapters on disk: which format, what they hold, with which scaling. One file a format; what comes out is always an `Adapter`."""
