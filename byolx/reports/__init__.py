"""Results beside the paper's."""
