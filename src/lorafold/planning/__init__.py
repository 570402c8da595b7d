"""What a merge will do, as pure data: adapters matched with a base, every tensor accounted for. Printing it is the dry run."""
