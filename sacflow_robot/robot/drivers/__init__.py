"""Robots by name: simulated, real-time simulated, Franka through deoxys, LeRobot."""
