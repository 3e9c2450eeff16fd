"""Human input devices, and interventions by them."""
