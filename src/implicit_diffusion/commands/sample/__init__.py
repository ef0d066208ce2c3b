"""`implicit-diffusion sample`."""
