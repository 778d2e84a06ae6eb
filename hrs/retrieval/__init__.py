"""Retrieval of engrams: what a model has read, found again by the mean of its hidden states."""
