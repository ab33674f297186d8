"""Text to shards, by any number of processes."""
