"""Robot drivers and the control loop. Never imports torch."""
