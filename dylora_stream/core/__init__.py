"""The ideas of the system, in the standard library and numpy: values, ports, statistics, novelty, clusters, routing."""
