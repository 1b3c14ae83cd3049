"""Sparse autoencoders with ProLU."""
