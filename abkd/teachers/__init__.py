"""Teachers: who gives the targets."""
