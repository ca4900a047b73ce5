"""Evaluates encoders and classifiers: features, k-NN, logistic regression, probes and metrics."""
