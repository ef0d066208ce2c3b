"""Images to pretrain on: where they are, and what they become."""
