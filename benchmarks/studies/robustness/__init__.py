"""How does accuracy respond to sparsity, noise and perturbed data? See `run`."""
