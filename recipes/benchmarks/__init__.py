"""Every claim about the optimizers, on many tasks."""
