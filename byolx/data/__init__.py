"""Data: reads images from disk, splits data sets, augments images, and loads batches of them."""
