"""Everything between an action and the robot: latch, filter, limits, braking."""
