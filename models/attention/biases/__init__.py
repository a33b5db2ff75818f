"""What is added to the logits, one bias per file: factories `bias(site) -> nn.Module`."""
