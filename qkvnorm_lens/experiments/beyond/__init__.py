"""What the paper left open."""
