"""Experiments, benchmarks and what they share: code of the checkout, no part of the wheel."""
