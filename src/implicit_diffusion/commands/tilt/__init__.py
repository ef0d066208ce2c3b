"""`implicit-diffusion tilt`."""
