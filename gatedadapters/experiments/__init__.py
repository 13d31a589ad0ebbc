"""From a search configuration to trained and tested models: what the command line and studies run."""
