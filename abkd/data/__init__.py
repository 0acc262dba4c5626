"""Data: instructions as token ids, and batches of them."""
