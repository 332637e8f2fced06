"""Video and image files, fitting pixels to the models' input, checks of the user's paths, files behind URLs."""
