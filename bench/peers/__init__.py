"""Other engines on the same work, one file per contender."""
