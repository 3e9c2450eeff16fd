"""Small tools that every package shares: files, seeds, rotations, intervals, plot style."""
