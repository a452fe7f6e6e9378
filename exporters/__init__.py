"""Passes that write graphs, build engines and check them: the only folder that knows any runtime."""
