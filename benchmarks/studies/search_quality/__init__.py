"""Does a searched structure beat a guessed one of the same size? See `run`."""
