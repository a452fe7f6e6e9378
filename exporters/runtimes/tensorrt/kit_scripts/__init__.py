"""Build and check an engine on a device. These scripts of a kit import nothing of intaglio."""
