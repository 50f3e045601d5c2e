"""What the user's model is, and where it can be gated."""
