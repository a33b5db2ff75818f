"""What can be chosen (YAML), and how a choice is read: command line, names, and messages for wrong ones."""
