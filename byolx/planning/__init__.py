"""Does it fit a TPU slice, how fast is a step, how fast is the input."""
