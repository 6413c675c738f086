"""Training: the trainer, its hooks, and the processes that run it."""
