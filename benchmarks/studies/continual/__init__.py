"""What is forgotten over a stream of tasks? See `run`."""
