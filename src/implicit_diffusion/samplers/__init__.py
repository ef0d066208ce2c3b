"""Samplers Σ: what turns parameters θ into particles."""
