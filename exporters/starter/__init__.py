"""Write the first recipe for a model, from what is known of the model without its weights."""
