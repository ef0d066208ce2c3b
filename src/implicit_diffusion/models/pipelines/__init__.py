"""Diffusers pipelines of any family, read off by running them with stand-ins."""
