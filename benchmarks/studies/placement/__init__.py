"""Which structure of a given size is best, and which score knows it beforehand? See `run`."""
