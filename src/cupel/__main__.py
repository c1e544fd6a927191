"""`python -m cupel` is the same as `cupel`."""

from cupel.cli import main

if __name__ == "__main__":
    main()
