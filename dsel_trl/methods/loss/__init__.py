"""By how well the model, or a reference, already knows an example or a token: by its loss."""
