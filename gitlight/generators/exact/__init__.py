"""Closed-form inversion, layer by layer: one rule per kind of layer, and the walk that applies them."""
