"""Train an image classifier with Lightning. The command is in README.md."""
