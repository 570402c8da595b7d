"""The names that the makers of image, video and sound models give to weights, beside diffusers': one table, read both ways."""
