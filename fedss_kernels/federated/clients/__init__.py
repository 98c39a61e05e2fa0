"""The clients' half of a round."""
