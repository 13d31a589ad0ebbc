"""Gated adapters: where adapters go, which kind and how large, in one training run."""
