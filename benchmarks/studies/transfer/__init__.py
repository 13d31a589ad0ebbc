"""Do adapters survive an update of their base? See `run`."""
