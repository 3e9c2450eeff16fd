"""Videos, and recordings for the Rerun viewer."""
