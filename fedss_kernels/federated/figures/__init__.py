"""What is measured of a run, or instead of one: a figure each."""
