"""Augmentation: draws the random numbers of a view, and applies them on the host or on the device."""
