"""`implicit-diffusion score`."""
