"""Models of the user's own: a denoiser, its sampler, and what they need to be trained and saved as others are."""
