"""Commands beside the trainer: run them as python -m tools.NAME. No file outside imports them."""
