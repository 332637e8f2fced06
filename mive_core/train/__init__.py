"""The trainer: tasks.train(recipe) reads a recipe and runs its task through the loop."""
