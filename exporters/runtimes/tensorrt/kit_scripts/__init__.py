"""What a kit holds beside the model: it runs on the device, so it imports nothing of intaglio."""
