"""`implicit-diffusion report`."""
