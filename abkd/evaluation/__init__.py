"""Evaluation: how close a student is to its teacher, and how its text compares with the references."""
