"""Small real language models made on the spot."""
