"""Finds out what is new and learns it: clusters and decisions, job folders and children, and the loop that commits."""
