"""The contracts, the one training loop, the one descent, and what they share."""
