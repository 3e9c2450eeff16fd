"""Flow policies, their training and their export."""
