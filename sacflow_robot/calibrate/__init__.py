"""Calibration profiles: what is known of one arm, in physical units."""
