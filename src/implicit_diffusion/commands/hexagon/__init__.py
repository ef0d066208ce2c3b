"""`implicit-diffusion hexagon`."""
