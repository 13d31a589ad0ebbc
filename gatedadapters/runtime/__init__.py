"""What happens while a model runs: one call of it, and the steps of its optimiser."""
