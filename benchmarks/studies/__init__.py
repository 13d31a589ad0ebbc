"""Studies of quality: a folder each, with its cells (what there is to run), arms (how), run and table."""
