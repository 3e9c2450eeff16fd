"""Calibration profiles: what is known of one robot, in physical units."""
