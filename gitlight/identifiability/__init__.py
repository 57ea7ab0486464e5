"""The identifiability report: what an architecture leaks, layer by layer, before any attack is run."""
