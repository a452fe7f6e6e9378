"""Scripts of a device kit. They run on the device, so they import nothing of intaglio."""
