"""Features, k-NN, logistic regression, probes, metrics."""
