"""`python -m intaglio` is the command `intaglio`."""

from intaglio.pipeline.cli.app import main

if __name__ == "__main__":
    main()
