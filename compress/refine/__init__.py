"""Closer INT8 without labels: channels equalized, weights rounded and biases corrected on recorded data."""
