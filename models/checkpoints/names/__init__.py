"""The names of weights in other people's files and ours: one file per source."""
