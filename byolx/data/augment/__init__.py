"""Augmentation: random numbers of views, and their application on the host or on the device."""
