"""Texts, labels and token ids."""
