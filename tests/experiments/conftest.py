"""Tiny models, made-up tables, and a configuration of a search over them."""

from __future__ import annotations

from tiny_runs import configured, decoder, encoder, tables, width

__all__ = ["configured", "decoder", "encoder", "tables", "width"]
