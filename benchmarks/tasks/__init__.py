"""What is measured: a task takes a scorer and gives counts and scores, and never asks which method it is."""
