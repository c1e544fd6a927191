"""What users bring: their models and their data, read without running anything that a file contains."""
