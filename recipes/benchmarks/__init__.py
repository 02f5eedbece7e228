"""Every claim about the optimizers, measured against tuned baselines: see README.md."""
