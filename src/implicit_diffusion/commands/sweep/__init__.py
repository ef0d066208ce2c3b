"""`implicit-diffusion sweep`."""
