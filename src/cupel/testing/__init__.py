"""Contract checks that every method passes; importable by people who write methods elsewhere."""
