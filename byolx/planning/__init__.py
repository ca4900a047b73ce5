"""Plans of training on TPUs: memory, speed and price of a train step, and speed of the image input."""
