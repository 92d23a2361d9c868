"""The training loop: the trainer, what moves in it and at what rate, and what listens to it."""
