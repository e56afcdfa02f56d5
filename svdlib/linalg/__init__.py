"""Matrices, knowing nothing of networks: orthonormal bases, truncated and randomized SVDs."""
