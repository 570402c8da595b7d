"""One file a verb: what a user calls, from paths to a report."""
