"""`implicit-diffusion compare`."""
