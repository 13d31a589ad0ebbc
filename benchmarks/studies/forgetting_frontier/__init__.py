"""What does a model lose in general when it has learned equally much of a domain? See `run`."""
