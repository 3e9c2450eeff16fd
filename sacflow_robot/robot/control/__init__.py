"""The control loop, its action sources and its operator."""
