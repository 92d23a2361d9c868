"""Training under masks."""
