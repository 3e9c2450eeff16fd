"""Episode log, demonstration files, replay buffer."""
