"""Video and image files, pixels fitted to what the models take, paths checked at the user's boundary, places behind URLs."""
