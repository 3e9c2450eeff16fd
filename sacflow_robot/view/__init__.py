"""What people look at: videos, and recordings for the Rerun viewer."""
