"""Array operations on fast weights. They know no model and no chat."""
