"""How the weights of a built model start: `initializer(model) -> None`, from torch's own generator."""
