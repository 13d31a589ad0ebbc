"""Tiny models, made-up tables, and a configuration of a search over them."""

from __future__ import annotations

from tiny_runs import chat_decoder, configured, decoder, encoder, tables, texts, width

__all__ = ["chat_decoder", "configured", "decoder", "encoder", "tables", "texts", "width"]
