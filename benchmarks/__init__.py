"""Measurements that take long; results are committed under results/."""
