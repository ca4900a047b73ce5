"""Augmentation: random numbers as data, and two bodies that apply them."""
