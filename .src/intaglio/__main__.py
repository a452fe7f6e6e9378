"""`python -m intaglio` is the command `intaglio`."""

from intaglio.pipeline.cli import main

if __name__ == "__main__":
    main()
