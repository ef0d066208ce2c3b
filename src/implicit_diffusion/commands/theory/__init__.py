"""`implicit-diffusion theory`."""
