"""A training loop of plain Accelerate, with AdamW and with ElraAdamW: two lines apart."""
