"""Can a search make an existing LoRA smaller? See `run`."""
