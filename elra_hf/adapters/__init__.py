"""What each framework needs to know of ELRA. Every module imports its framework lazily."""
