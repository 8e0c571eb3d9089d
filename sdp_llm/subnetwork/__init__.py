"""What one rank's model is."""
