"""Adapters from one format to another. One file writes each; what they all start from is a list of updates."""
