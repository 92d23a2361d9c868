"""eval: on a task, beside a baseline, or by EleutherAI's harness."""
