"""The nets by name."""
