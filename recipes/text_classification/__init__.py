"""Fine-tuning of a text classifier with the Hugging Face Trainer."""
