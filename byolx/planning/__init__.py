"""Memory, speed and price of a train step on a TPU slice, and speed of the input."""
