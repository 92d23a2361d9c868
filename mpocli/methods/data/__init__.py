"""What a command reads of texts and tasks: for training and evaluation, and for calibration."""
