"""Recipes: read, planned, run, judged, and the claims of papers measured again."""
