"""Measurements that anyone can repeat, as ratios within one run."""
