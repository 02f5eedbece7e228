"""Runnable recipes: each trains a real model with an ELRA optimizer and writes a model card."""
