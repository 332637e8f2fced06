"""The trainer. Entry point: tasks.train, which runs the task of a recipe in the training loop."""
