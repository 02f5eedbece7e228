"""Causal language models with the Hugging Face Trainer, from scratch or with LoRA."""
