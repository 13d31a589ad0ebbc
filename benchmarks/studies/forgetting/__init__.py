"""What does a model forget while it learns a domain? See `run`."""
