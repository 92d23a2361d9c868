"""What a model predicts, and how good that is."""
