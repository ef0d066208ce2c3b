"""What is trained: model, conditions, chain, rewards and estimator, checked before any long work."""
