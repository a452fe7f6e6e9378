"""The rules of lint, by what they look at. Each rule is a function that yields what it finds in one graph."""
