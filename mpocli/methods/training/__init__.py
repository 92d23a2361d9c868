"""One training run under every command that trains, a question a file."""
