"""The model: a frozen backbone, a pool of experts above its stem, their router, and their training."""
