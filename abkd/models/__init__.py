"""Models: loading a causal language model, and making a student out of a teacher."""
