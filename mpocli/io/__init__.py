"""Files: checkpoints, the manifest, and output directories; no transformers."""
